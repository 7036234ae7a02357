package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"

	"sekisho/attest"
)

// Commons counts how common firmware measurements (PCR 0 to 3) are: learned
// from the devices affirmed here and from the summaries of other
// organisations. It reports and never decides by itself. It is safe for
// concurrent use.
type Commons struct {
	path         string
	organization string

	mu    sync.Mutex
	known commons
	count map[attest.Digest]int // devices here, by firmware
}

type commons struct {
	Devices map[attest.Digest]attest.Digest  `json:"devices"` // firmware of each device
	Others  map[string]map[attest.Digest]int `json:"others"`  // by organisation and firmware
}

// FirmwareSummary is what an organisation tells others: no device in it.
type FirmwareSummary struct {
	Organization string                `json:"organization"`
	Firmware     map[attest.Digest]int `json:"firmware"` // devices by firmware
}

const (
	maxSummary       = 1 << 16 // firmware values of one organisation
	maxOrganizations = 4096
)

// OpenCommons reads the counts from a file, which need not exist.
func OpenCommons(path, organization string) (*Commons, error) {
	c := &Commons{path: path, organization: organization, count: make(map[attest.Digest]int)}
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &c.known)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("firmware counts: %w", err)
	}
	if c.known.Devices == nil {
		c.known.Devices = make(map[attest.Digest]attest.Digest)
	}
	if c.known.Others == nil {
		c.known.Others = make(map[string]map[attest.Digest]int)
	}
	for _, f := range c.known.Devices {
		c.count[f]++
	}
	return c, nil
}

// Learn notes the firmware of a device that was affirmed.
func (c *Commons) Learn(device, firmware attest.Digest) error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old, ok := c.known.Devices[device]
	if ok && old == firmware {
		return nil
	}
	if ok {
		c.count[old]--
	}
	c.known.Devices[device] = firmware
	c.count[firmware]++
	return c.save()
}

func (c *Commons) save() error {
	data, err := json.Marshal(c.known)
	if err == nil {
		err = replace(c.path, data)
	}
	if err != nil {
		return fmt.Errorf("firmware counts: %w", err)
	}
	return nil
}

// Count says on how many other devices, of how many organisations, this
// firmware was seen.
func (c *Commons) Count(device, firmware attest.Digest) *attest.Firmware {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f := &attest.Firmware{Digest: firmware, Devices: c.count[firmware]}
	if c.known.Devices[device] == firmware {
		f.Devices--
	}
	if f.Devices > 0 {
		f.Organizations = 1
	}
	for _, other := range c.known.Others {
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
	if c == nil {
		return s
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Organization = c.organization
	maps.Copy(s.Firmware, c.count)
	maps.DeleteFunc(s.Firmware, func(_ attest.Digest, n int) bool { return n == 0 })
	return s
}

// Import takes in another organisation's summary, in place of its last one.
func (c *Commons) Import(s FirmwareSummary) error {
	switch {
	case c == nil:
		return errors.New("this verifier counts no firmware")
	case s.Organization == "" || len(s.Organization) > attest.MaxName || s.Organization == c.organization:
		return fmt.Errorf("summary of organisation %.64q: want another one's", s.Organization)
	case len(s.Firmware) > maxSummary:
		return fmt.Errorf("summary of %d firmware values, at most %d", len(s.Firmware), maxSummary)
	}
	for f, n := range s.Firmware {
		if n < 0 {
			return fmt.Errorf("firmware %s on %d devices", f, n)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.known.Others[s.Organization]; !ok && len(c.known.Others) >= maxOrganizations {
		return fmt.Errorf("summaries of %d organisations are here already", maxOrganizations)
	}
	c.known.Others[s.Organization] = maps.Clone(s.Firmware)
	return c.save()
}
