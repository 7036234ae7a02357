// Package guestlink is the contract between the host domain and the work
// domain: vsock addresses, frames and control messages. It does no I/O.
package guestlink

import "net/netip"

const (
	// HostCID is the vsock context id of the host domain (VMADDR_CID_HOST).
	HostCID = 2
	// WorkCID is the vsock context id given to the work domain.
	WorkCID = 3
	// PortPackets is the only vsock port that the host domain publishes.
	PortPackets = 1024
)

// Config is what the work domain's network device is set to.
type Config struct {
	Address netip.Prefix `json:"address"` // inner address, /32 or /128
	MTU     int          `json:"mtu"`     // bytes
	DNS     []netip.Addr `json:"dns"`     // may be empty
}
