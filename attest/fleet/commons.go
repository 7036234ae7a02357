package fleet

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
)

// Commons counts how common firmware measurements (PCR 0 to 3) are: learned
// from the devices affirmed here and from the summaries of other
// organisations. It reports and never decides by itself. It follows the store,
// and is safe for concurrent use.
type Commons struct {
	organization string

	mu      sync.Mutex
	devices map[attest.Digest]attest.Digest  // firmware of each device
	others  map[string]map[attest.Digest]int // by organisation and firmware
	count   map[attest.Digest]int            // devices here, by firmware
}

func newCommons(organization string) *Commons {
	return &Commons{organization: organization, devices: make(map[attest.Digest]attest.Digest),
		others: make(map[string]map[attest.Digest]int), count: make(map[attest.Digest]int)}
}

// apply takes in one record of the store; value is nil if it was removed.
func (c *Commons) apply(key string, value []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if name, ok := strings.CutPrefix(key, "organization/"); ok {
		var counts map[attest.Digest]int
		if err := json.Unmarshal(value, &counts); err != nil {
			return err
		}
		c.others[name] = counts
		return nil
	}
	var id, firmware attest.Digest
	if err := id.UnmarshalText([]byte(strings.TrimPrefix(key, "device/"))); err != nil {
		return err
	}
	if old, ok := c.devices[id]; ok {
		if c.count[old]--; c.count[old] == 0 {
			delete(c.count, old)
		}
		delete(c.devices, id)
	}
	if value == nil {
		return nil
	}
	if err := firmware.UnmarshalText(value); err != nil {
		return err
	}
	c.devices[id] = firmware
	c.count[firmware]++
	return nil
}

// learned reports whether the firmware of a device is known already.
func (c *Commons) learned(device, firmware attest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	old, ok := c.devices[device]
	return ok && old == firmware
}

// FirmwareSummary is what an organisation tells others: no device in it.
type FirmwareSummary struct {
	Organization string                `json:"organization"`
	Firmware     map[attest.Digest]int `json:"firmware"` // devices by firmware
}

const (
	maxSummary       = 1 << 14 // firmware values of one organisation
	maxOrganizations = 4096
)

// Count says on how many other devices, of how many organisations, this
// firmware was seen.
func (c *Commons) Count(device, firmware attest.Digest) *attest.Firmware {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := &attest.Firmware{Digest: firmware, Devices: c.count[firmware]}
	if c.devices[device] == firmware {
		f.Devices--
	}
	if f.Devices > 0 {
		f.Organizations = 1
	}
	for _, other := range c.others {
		if n := other[firmware]; n > 0 {
			f.Devices += n
			f.Organizations++
		}
	}
	return f
}

// Summary is what this organisation can tell others.
func (c *Commons) Summary() FirmwareSummary {
	s := FirmwareSummary{Firmware: make(map[attest.Digest]int)}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Organization = c.organization
	maps.Copy(s.Firmware, c.count)
	return s
}

// ImportFirmware takes in another organisation's summary, in place of its last
// one.
func (s *Service) ImportFirmware(ctx context.Context, sum FirmwareSummary) error {
	switch {
	case sum.Organization == "" || len(sum.Organization) > attest.MaxName || sum.Organization == s.Organization:
		return fmt.Errorf("summary of organisation %.64q: want another one's", sum.Organization)
	case len(sum.Firmware) > maxSummary:
		return fmt.Errorf("summary of %d firmware values, at most %d", len(sum.Firmware), maxSummary)
	}
	for f, n := range sum.Firmware {
		if n < 0 {
			return fmt.Errorf("firmware %s on %d devices", f, n)
		}
	}
	key := s.keys.otherFirmware(sum.Organization)
	s.Commons.mu.Lock()
	_, known := s.Commons.others[strings.TrimPrefix(key, s.keys.otherFirmware(""))]
	n := len(s.Commons.others)
	s.Commons.mu.Unlock()
	if !known && n >= maxOrganizations {
		return fmt.Errorf("summaries of %d organisations are here already", maxOrganizations)
	}
	return s.change(ctx, func(t concurrency.STM) error { return write(t, key, sum.Firmware) })
}
