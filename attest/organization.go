// Package attest holds the vocabulary of remote attestation as RFC 9334 (RATS)
// names it: evidence, reference values, attestation results, and the
// organisation whose policy is in force. It does no I/O.
package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"slices"

	"sekisho/attest/cryptrec"
)

// OrganizationFile is where the host domain finds its Organization.
const OrganizationFile = "/etc/sekisho/organization.json"

// maxOrganizationFile bounds ParseOrganization's input in bytes.
const maxOrganizationFile = 256 << 10

// Firmware of the work domain.
const (
	FirmwareUEFI = "uefi"
	// FirmwareBIOS is for hosts that are themselves emulated: QEMU's software
	// emulation aborts when a nested guest's UEFI writes CR8 with an interrupt
	// pending ("tcg_handle_interrupt: assertion failed", QEMU 7.2 and 10.0).
	FirmwareBIOS = "bios"
)

// What becomes of what the work domain writes to its disk. The disk is
// encrypted either way.
const (
	DiskPersistent = "persistent"
	// DiskEphemeral sends writes to a layer whose key is in memory alone: they
	// are gone when the laptop is switched off.
	DiskEphemeral = "ephemeral"
)

// Ways of the guest link. An empty one means LinkVsock.
const (
	LinkVsock = "vsock"
	// LinkSerial is one virtio-serial port, for a work domain without a driver
	// for vsock.
	LinkSerial = "serial"
)

// WorkDomain says how the host domain runs the work domain.
type WorkDomain struct {
	MemoryMiB int    `json:"memory_mib"`
	VCPUs     int    `json:"vcpus"`
	Firmware  string `json:"firmware"`       // FirmwareUEFI or FirmwareBIOS
	Disk      string `json:"disk"`           // DiskPersistent or DiskEphemeral
	Link      string `json:"link,omitempty"` // LinkVsock or LinkSerial
}

// Organization is the configuration of one organisation's laptops. It is part
// of the signed image and therefore of what is measured; it holds no secret.
type Organization struct {
	Name      string     `json:"name"`
	CA        string     `json:"ca"` // PEM, roots for the servers' certificates
	Verifiers []Endpoint `json:"verifiers"`
	Gateways  []Endpoint `json:"gateways"`
	// Proxy is an HTTP proxy that laptops reach gateways and verifiers by
	// (CONNECT, RFC 9110, section 9.3.6), where the network lets nothing else out.
	// With it nothing goes there straight, without it everything does.
	Proxy netip.AddrPort `json:"proxy,omitzero"`
	// KeyAgreement is the least for the tunnel, the beacon and the verifiers,
	// p256-mlkem768 if absent. The gateways' and beacons' own configurations
	// have the same field.
	KeyAgreement cryptrec.KeyAgreement `json:"key_agreement,omitzero"`

	WorkDomain WorkDomain `json:"work_domain"`
	Office     *Office    `json:"office,omitempty"` // absent: no LAN is ever an office
	// Uplinks is the order in which laptops prefer their uplinks: the first rule
	// that fits a link gives its place, and a link that none fits is not used.
	// Empty means wired, Wi-Fi, USB.
	Uplinks []UplinkRule `json:"uplinks,omitempty"`
	// Groups names devices by their ids in hexadecimal, for rules.
	Groups map[string][]string `json:"groups,omitempty"`
	Logon  *Logon              `json:"logon,omitempty"` // absent: the work domain has no card reader
	// EscrowKey is the public key (PEM, P-256) to which the recovery keys of
	// the work domains' disks are encrypted. Without it no disk is made.
	EscrowKey string `json:"escrow_key,omitempty"`
	// Updates is absent where laptops take no releases from a verifier.
	Updates *Updates `json:"updates,omitempty"`
	// NetworkAccess is absent where no network asks for 802.1X.
	NetworkAccess *NetworkAccess `json:"network_access,omitempty"`
}

// Beacon is the server that proves a LAN to be one of the organisation's.
type Beacon struct {
	Endpoint
	Site string `json:"site"` // its certificate's one URI name is SiteURI of it
}

// Office says how a LAN is known to be an office of the organisation's.
type Office struct {
	CA      string   `json:"ca"` // PEM, roots for the beacons' certificates and for nothing else
	Beacons []Beacon `json:"beacons"`
	// StayInTunnel keeps the work domain in the tunnel in the office too.
	StayInTunnel bool `json:"stay_in_tunnel,omitempty"`
	// MaxRoundTripMS bounds the round trip to a beacon, in milliseconds; a
	// relay from another place takes longer. DefaultRoundTripMS if absent.
	MaxRoundTripMS int `json:"max_round_trip_ms,omitempty"`
}

// DefaultRoundTripMS is Office.MaxRoundTripMS unless the organisation says otherwise.
const DefaultRoundTripMS = 5

// Updates says whose releases laptops take, and how.
type Updates struct {
	// Keys sign releases, Threshold of them each one: PEM, P-256.
	Keys      []string `json:"keys"`
	Threshold int      `json:"threshold"`
	// TrialMinutes is how long a new release may take to prove good while there
	// is an uplink, before the laptop goes back to the one before it;
	// DefaultTrialMinutes if absent.
	TrialMinutes int `json:"trial_minutes,omitempty"`
}

// DefaultTrialMinutes is Updates.TrialMinutes unless the organisation says
// otherwise.
const DefaultTrialMinutes = 10

// PublicKeys returns the keys of u.
func (u *Updates) PublicKeys() ([]*ecdsa.PublicKey, error) {
	var list []*ecdsa.PublicKey
	for i, text := range u.Keys {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			return nil, fmt.Errorf("organization: updates: keys[%d]: no PEM", i)
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("organization: updates: keys[%d]: %w", i, err)
		}
		ec, ok := key.(*ecdsa.PublicKey)
		if !ok || ec.Curve != elliptic.P256() {
			return nil, fmt.Errorf("organization: updates: keys[%d]: %T, want ECDSA on P-256", i, key)
		}
		list = append(list, ec)
	}
	return list, nil
}

func (u *Updates) validate() error {
	_, err := u.PublicKeys()
	if len(u.Keys) > 16 || u.Threshold < 1 || u.Threshold > len(u.Keys) {
		err = errors.Join(err, fmt.Errorf("organization: updates: %d of %d keys must sign: want 1 to all of at most 16", u.Threshold, len(u.Keys)))
	}
	if u.TrialMinutes < 0 || u.TrialMinutes > 24*60 {
		err = errors.Join(err, fmt.Errorf("organization: updates: trial_minutes %d: want 1 to 1440", u.TrialMinutes))
	}
	return err
}

// SiteURI names an office in its beacon's certificate.
func SiteURI(site string) string { return "urn:sekisho:site:" + site }

// Roots returns the certificate pool made of o.CA.
func (o *Office) Roots() (*x509.CertPool, error) { return roots("office: ca", o.CA) }

func (o *Office) validate() error {
	var errs []error
	fail := func(format string, a ...any) { errs = append(errs, fmt.Errorf("organization: office: "+format, a...)) }
	if _, err := o.Roots(); err != nil {
		errs = append(errs, err)
	}
	if len(o.Beacons) == 0 || len(o.Beacons) > 1024 {
		fail("%d beacons, want 1 to 1024", len(o.Beacons))
	}
	for i, b := range o.Beacons {
		if !b.unicast() || b.Address6.IsValid() || b.ServerName == "" || b.Site == "" || len(b.Site) > 64 {
			fail("beacons[%d]: want a unicast address with a port, a server_name, and a site of 1 to 64 bytes", i)
		}
	}
	if o.MaxRoundTripMS < 0 || o.MaxRoundTripMS > 1000 {
		fail("max_round_trip_ms %d: want 1 to 1000", o.MaxRoundTripMS)
	}
	return errors.Join(errs...)
}

// UplinkRule gives a sort of uplink its place. Every field that is set must fit.
type UplinkRule struct {
	Kind string `json:"kind,omitempty"` // "wired", "wifi" or "usb"
	Name string `json:"name,omitempty"` // the kernel's name of the link, such as "eth0"
	// Device is a USB device by vendor and product, "12d1:14db": the
	// organisation's own sticks, whose SIM is in a closed network.
	Device string `json:"device,omitempty"`
	// Groups allows the uplink only to laptops in one of these groups.
	Groups  []string `json:"groups,omitempty"`
	Metered bool     `json:"metered,omitempty"` // costs by volume; shown to the user
}

// NetworkAccess says how laptops get into networks that ask for 802.1X
// (EAP-TLS with the laptop's network identity).
type NetworkAccess struct {
	Server string   `json:"server"`          // DNS name in the authentication servers' certificates
	CA     string   `json:"ca"`              // PEM, the one root of these certificates
	Wired  bool     `json:"wired,omitempty"` // answer switches that ask for it
	SSIDs  []string `json:"ssids,omitempty"` // Wi-Fi networks of the organisation
}

func (n *NetworkAccess) validate() error {
	var errs []error
	b, rest := pem.Decode([]byte(n.CA))
	if b == nil || b.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) != 0 {
		errs = append(errs, errors.New("organization: network_access: ca: want one PEM block with a certificate"))
	} else if _, err := x509.ParseCertificate(b.Bytes); err != nil {
		errs = append(errs, fmt.Errorf("organization: network_access: ca: %w", err))
	}
	if n.Server == "" || len(n.Server) > 253 {
		errs = append(errs, fmt.Errorf("organization: network_access: server %.64q: want the DNS name in the authentication servers' certificates", n.Server))
	}
	if len(n.SSIDs) > 16 || slices.ContainsFunc(n.SSIDs, func(s string) bool { return s == "" || len(s) > 32 }) {
		errs = append(errs, fmt.Errorf("organization: network_access: ssids %.64q: want at most 16 of 1 to 32 bytes", n.SSIDs))
	}
	return errors.Join(errs...)
}

// The kinds that an UplinkRule may name.
var uplinkKinds = []string{"", "wired", "wifi", "usb"}

// usbID is a USB device's vendor and product as lsusb(8) prints them.
var usbID = regexp.MustCompile("^[0-9a-f]{4}:[0-9a-f]{4}$")

// ParseOrganization reads and validates an Organization from JSON. Unknown
// fields, data after the document and documents over 256 KiB are errors.
func ParseOrganization(data []byte) (*Organization, error) {
	if len(data) > maxOrganizationFile {
		return nil, fmt.Errorf("organization: %d bytes, at most %d", len(data), maxOrganizationFile)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var o Organization
	if err := d.Decode(&o); err != nil {
		return nil, fmt.Errorf("organization: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("organization: data after the document")
	}
	return &o, o.Validate()
}

// Validate reports every fault of o, joined.
func (o *Organization) Validate() error {
	var errs []error
	fail := func(format string, a ...any) { errs = append(errs, fmt.Errorf("organization: "+format, a...)) }
	if o.Name == "" || len(o.Name) > 64 {
		fail("name %q: want 1 to 64 bytes", o.Name)
	}
	if _, err := o.Roots(); err != nil {
		errs = append(errs, err)
	}
	for what, list := range map[string][]Endpoint{"verifiers": o.Verifiers, "gateways": o.Gateways} {
		if len(list) == 0 || len(list) > 16 {
			fail("%s: %d entries, want 1 to 16", what, len(list))
		}
		for i, e := range list {
			if !e.unicast() {
				fail("%s[%d]: address %s is not a unicast address with a port, or address6 %s no IPv6 one beside an IPv4 one", what, i, e.Address, e.Address6)
			}
			if e.ServerName == "" {
				fail("%s[%d]: server_name is empty", what, i)
			}
		}
	}
	if o.Updates != nil {
		if err := o.Updates.validate(); err != nil {
			errs = append(errs, err)
		}
	}
	if n := o.NetworkAccess; n != nil {
		if block, rest := pem.Decode([]byte(n.CA)); block == nil || len(bytes.TrimSpace(rest)) > 0 {
			fail("network_access: ca: want one certificate")
		} else if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			fail("network_access: ca: %w", err)
		}
		if n.Server == "" || len(n.SSIDs) > 16 || slices.ContainsFunc(n.SSIDs, func(s string) bool { return s == "" || len(s) > 32 }) {
			fail("network_access: want a server, and at most 16 SSIDs of 1 to 32 bytes")
		}
	}
	if len(o.Uplinks) > 16 {
		fail("uplinks: %d rules, at most 16", len(o.Uplinks))
	}
	for i, r := range o.Uplinks {
		if !slices.Contains(uplinkKinds, r.Kind) {
			fail("uplinks[%d]: kind %q: want one of %q", i, r.Kind, uplinkKinds[1:])
		}
		if r.Device != "" && !usbID.MatchString(r.Device) {
			fail("uplinks[%d]: device %q: want vendor and product such as 12d1:14db", i, r.Device)
		}
		for _, g := range r.Groups {
			if _, ok := o.Groups[g]; !ok {
				fail("uplinks[%d]: group %q is not in groups", i, g)
			}
		}
	}
	if p := o.Proxy; p != (netip.AddrPort{}) && (!p.IsValid() || p.Port() == 0 || p.Addr().IsLoopback() || p.Addr().IsMulticast() || p.Addr().IsUnspecified()) {
		fail("proxy: %s is not a unicast address with a port", p)
	}
	if w := o.WorkDomain; w.MemoryMiB < 64 || w.MemoryMiB > 1<<20 || w.VCPUs < 1 || w.VCPUs > 256 {
		fail("work_domain: %d MiB and %d vCPUs: want 64 to 1048576 and 1 to 256", w.MemoryMiB, w.VCPUs)
	}
	if f := o.WorkDomain.Firmware; f != FirmwareUEFI && f != FirmwareBIOS {
		fail("work_domain: firmware %q: want %q or %q", f, FirmwareUEFI, FirmwareBIOS)
	}
	if o.Office != nil {
		errs = append(errs, o.Office.validate())
	}
	if o.Logon != nil {
		errs = append(errs, o.Logon.Validate())
	}
	if d := o.WorkDomain.Disk; d != DiskPersistent && d != DiskEphemeral {
		fail("work_domain: disk %q: want %q or %q", d, DiskPersistent, DiskEphemeral)
	}
	if n := o.NetworkAccess; n != nil {
		errs = append(errs, n.validate())
	}
	if o.EscrowKey != "" {
		if _, err := o.Escrow(); err != nil {
			errs = append(errs, err)
		}
	}
	if l := o.WorkDomain.Link; l != "" && l != LinkVsock && l != LinkSerial {
		fail("work_domain: link %q: want %q or %q", l, LinkVsock, LinkSerial)
	}
	return errors.Join(errs...)
}

// ErrNoEscrow: the organisation has no escrow key.
var ErrNoEscrow = errors.New("organization: escrow_key is empty: recovery keys could not be escrowed, so no disk is made")

// Escrow returns the public key made of o.EscrowKey.
func (o *Organization) Escrow() (*ecdsa.PublicKey, error) {
	if o.EscrowKey == "" {
		return nil, ErrNoEscrow
	}
	b, rest := pem.Decode([]byte(o.EscrowKey))
	if b == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("organization: escrow_key: want one PEM block with a public key")
	}
	k, err := x509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("organization: escrow_key: %w", err)
	}
	ec, ok := k.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("organization: escrow_key of type %T, want ECDSA on P-256", k)
	}
	return ec, nil
}

// Roots returns the certificate pool made of o.CA.
func (o *Organization) Roots() (*x509.CertPool, error) { return roots("ca", o.CA) }

func roots(field, text string) (*x509.CertPool, error) {
	pool, rest, n := x509.NewCertPool(), []byte(text), 0
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("organization: %s: %w", field, err)
		}
		pool.AddCert(c)
		n++
	}
	if n == 0 {
		return nil, fmt.Errorf("organization: %s: no certificate in it", field)
	}
	return pool, nil
}
