// Package guestlink is the contract between the host domain and the work
// domain: vsock addresses, frames and control messages. It does no I/O of its
// own; docs/guestlink.md describes the same bytes in words.
package guestlink

import (
	"fmt"
	"net/netip"
)

const (
	// HostCID is the vsock context id of the host domain (VMADDR_CID_HOST).
	HostCID = 2
	// WorkCID is the vsock context id given to the work domain.
	WorkCID = 3
	// PortPackets is the only vsock port that the host domain publishes.
	PortPackets = 1024
	// WorkLink is the host domain's device for the work domain's packets.
	WorkLink = "work0"
)

// Limits of a Config. The lower bound of MTU is what IPv6 asks of every link
// (RFC 8200, section 5); the upper one is the largest IP packet.
const (
	MinMTU = 1280
	MaxMTU = MaxPacket
	MaxDNS = 8
)

// Config is what the work domain's network device is set to. The zero value is
// no configuration: nothing is carried.
type Config struct {
	Address netip.Prefix `json:"address"` // inner address, /32 or /128
	// Address6 is the IPv6 inner address beside an IPv4 one, /128; zero if there
	// is none. A guest without CapAddress6 is not told of it.
	Address6 netip.Prefix `json:"address6,omitzero"`
	MTU      int          `json:"mtu"` // bytes
	DNS      []netip.Addr `json:"dns"` // may be empty
}

// Addresses are the inner addresses.
func (c Config) Addresses() []netip.Prefix {
	if !c.Address6.IsValid() {
		return []netip.Prefix{c.Address}
	}
	return []netip.Prefix{c.Address, c.Address6}
}

// Holds reports whether a is an inner address.
func (c Config) Holds(a netip.Addr) bool {
	return a.IsValid() && (a == c.Address.Addr() || a == c.Address6.Addr())
}

// Validate reports the first fault of c.
func (c Config) Validate() error {
	for _, p := range c.Addresses() {
		switch a := p.Addr(); {
		case !p.IsValid() || !p.IsSingleIP():
			return fmt.Errorf("config: address %q is not a single address (/32 or /128)", p)
		case a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.Is4In6() || a.Zone() != "":
			return fmt.Errorf("config: address %s is not a unicast address", p)
		}
	}
	switch {
	case c.Address6.IsValid() && (!c.Address6.Addr().Is6() || !c.Address.Addr().Is4()):
		return fmt.Errorf("config: address %s and address6 %s: want an IPv4 and an IPv6 one", c.Address, c.Address6)
	case c.MTU < MinMTU || c.MTU > MaxMTU:
		return fmt.Errorf("config: mtu %d, want %d to %d", c.MTU, MinMTU, MaxMTU)
	case len(c.DNS) > MaxDNS:
		return fmt.Errorf("config: %d name servers, at most %d", len(c.DNS), MaxDNS)
	}
	for _, d := range c.DNS {
		if !d.IsValid() || d.IsUnspecified() || d.IsLoopback() || d.IsMulticast() || d.Zone() != "" {
			return fmt.Errorf("config: name server %q is not a unicast address", d)
		}
	}
	return nil
}

// Equal reports whether c and d set a device to the same.
func (c Config) Equal(d Config) bool {
	if c.Address != d.Address || c.Address6 != d.Address6 || c.MTU != d.MTU || len(c.DNS) != len(d.DNS) {
		return false
	}
	for i := range c.DNS {
		if c.DNS[i] != d.DNS[i] {
			return false
		}
	}
	return true
}
