package netd

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
)

// maxPlain bounds Plain in characters.
const maxPlain = 300

// Plain makes one harmless line of text that may hold a stranger's words, such as
// the names in a certificate that a portal showed: people read it on a terminal.
func Plain(s string) string {
	n := 0
	return strings.Map(func(r rune) rune {
		switch n++; {
		case n > maxPlain:
			return -1
		case !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s)
}

// Reason codes of Status and of an uplink. Attestation's own codes (package
// attest) appear in Status.Reason too while the state is Attesting.
const (
	ReasonKernel      = "kernel"               // the kernel refused the plan, or does not hold it
	ReasonNoLink      = "no-link"              // no Ethernet link
	ReasonNoCarrier   = "no-carrier"           // no cable, or the far end is off
	ReasonNoLease     = "no-lease"             // no DHCP server has answered
	ReasonBadLease    = "bad-lease"            // a DHCP server's answer is absurd
	ReasonNotAllowed  = "not-allowed"          // the organisation does not allow this uplink
	ReasonUnserved    = "unserved"             // a network card, but no driver or firmware for it
	ReasonNoNetwork   = "no-network"           // no saved Wi-Fi network is in reach
	ReasonWrongSecret = "wrong-secret"         // the network did not accept the passphrase or the certificate
	ReasonNoRadio     = "no-radio"             // wpa_supplicant does not answer
	ReasonNoIdentity  = "no-identity"          // the network asks for a network identity, and there is none yet
	ReasonAttestd     = "attestd-unreachable"  // attestd's socket does not answer
	ReasonVerifier    = "verifier-unreachable" // attestd cannot reach any verifier
	ReasonAttestation = "not-affirming"        // attestd gave no code of its own
	ReasonLapsed      = "credential-lapsed"    // and attestd has no newer one yet
	ReasonConnecting  = "connecting"           // credential in force, the tunnel is being opened
	ReasonGateway     = "gateway-unreachable"
	ReasonProxy       = "proxy-refused"   // the organisation's proxy lets nobody through to the gateway
	ReasonRefused     = "gateway-refused" // one side did not accept the other's certificate, or there is no room
)

// Kinds of uplink, as Uplink.Kind has them.
const (
	KindWired = "wired"
	KindWifi  = "wifi"
	KindUSB   = "usb" // an Ethernet device on USB: dongles, and most LTE sticks
)

// Health of an uplink, as the probe towards the gateways found it.
const (
	HealthUnknown = "" // not probed yet
	HealthGood    = "good"
	HealthDead    = "dead" // packets go in and nothing comes back
)

// Uplink is what is known of a link towards the Internet.
type Uplink struct {
	Name    string `json:"name"` // empty while there is no link
	Kind    string `json:"kind,omitempty"`
	Driver  string `json:"driver,omitempty"` // the kernel's name of it
	Metered bool   `json:"metered,omitempty"`
	Network string `json:"network,omitempty"` // SSID of the Wi-Fi network it is joined to
	Signal  int    `json:"signal,omitempty"`  // of Wi-Fi, in dBm
	// AccessPoint is the hardware address of the one that it is joined to.
	AccessPoint string       `json:"access_point,omitempty"`
	Health      string       `json:"health,omitempty"`
	Losses      int          `json:"losses,omitempty"` // how often it was lost lately
	Since       time.Time    `json:"since,omitzero"`   // since when it is usable without a break
	Carrier     bool         `json:"carrier"`
	Address     netip.Prefix `json:"address,omitzero"` // zero while there is no sound lease
	Router      netip.Addr   `json:"router,omitzero"`
	MTU         int          `json:"mtu,omitempty"` // bytes
	// Address6 is the IPv6 address, Local6 the link-local one beside it, Router6
	// the router's link-local one, MTU6 what the router says that IPv6 packets may
	// be, in bytes, or 0. IPv6 says why there is none, if something was heard of it.
	Address6 netip.Addr `json:"address6,omitzero"`
	Local6   netip.Addr `json:"local6,omitzero"`
	Router6  netip.Addr `json:"router6,omitzero"`
	MTU6     int        `json:"mtu6,omitempty"`
	IPv6     string     `json:"ipv6,omitempty"`
	// PathMTU is less than MTU where the way to the servers swallows longer
	// packets without a word, as a probe has found; else 0.
	PathMTU int `json:"path_mtu,omitempty"`
	// SignIn: the network says that it has a sign-in page. Anybody can say so.
	SignIn  bool      `json:"sign_in,omitempty"`
	Expires time.Time `json:"expires,omitzero"` // end of the lease
	Reason  string    `json:"reason,omitempty"` // why it is unusable, empty when it is usable
	Detail  string    `json:"detail,omitempty"`
}

// Usable reports whether the uplink has carrier and a sound address.
func (u Uplink) Usable() bool {
	return u.Carrier && (u.Address.IsValid() || u.Address6.IsValid()) && u.Reason == ""
}

// Addresses are the uplink's, for people.
func (u Uplink) Addresses() string {
	switch {
	case !u.Address6.IsValid():
		return u.Address.String()
	case !u.Address.IsValid():
		return u.Address6.String()
	}
	return u.Address.String() + " " + u.Address6.String()
}

// What becomes of the secrets by which the laptop gets into networks.
const (
	AccessPending  = "pending"         // attestd has not answered yet
	AccessKept     = "kept"            // over power-off
	AccessVolatile = "until-power-off" // this boot is not one that may keep them
)

// Access says whether saved networks outlive power-off, and what the laptop
// shows to networks with 802.1X.
type Access struct {
	State         string    `json:"state"`            // one of those above
	Detail        string    `json:"detail,omitempty"` // why it is not kept
	Identity      string    `json:"identity,omitempty"`
	IdentityUntil time.Time `json:"identity_until,omitzero"`
}

// Unserved is a network device without a link.
type Unserved struct {
	Device string `json:"device"`           // "pci 0000:00:14.3", "usb 1-2:1.0"
	ID     string `json:"id"`               // vendor and product, "8086:a0f0"
	Driver string `json:"driver,omitempty"` // bound to it, yet without a link: most often firmware is missing
}

func (u Unserved) String() string {
	if u.Driver == "" {
		return fmt.Sprintf("%s (%s) has no driver", u.Device, u.ID)
	}
	return fmt.Sprintf("%s (%s): driver %s made no link, its firmware may be missing", u.Device, u.ID, u.Driver)
}

// Words says it to the person at the laptop.
func (u Unserved) Words() Words {
	if u.Driver == "" {
		return Words{u.String(), fmt.Sprintf("%s（%s）: ドライバーがありません。", u.Device, u.ID)}
	}
	return Words{u.String(), fmt.Sprintf("%s（%s）: ドライバー %s が動作していません。ファームウェアがない可能性があります。", u.Device, u.ID, u.Driver)}
}

// SignalSample is how well a radio heard its network at a moment.
type SignalSample struct {
	At  time.Time `json:"at"`
	DBM int       `json:"dbm"` // 0: not joined
}

// Counters count one direction pair of a tunnel session since it opened.
type Counters struct {
	SentPackets     uint64 `json:"sent_packets"`
	SentBytes       uint64 `json:"sent_bytes"`
	ReceivedPackets uint64 `json:"received_packets"`
	ReceivedBytes   uint64 `json:"received_bytes"`
	Dropped         uint64 `json:"dropped"` // full queue, spoofed or malformed
}

// TunnelStatus describes the open session.
type TunnelStatus struct {
	Gateway  netip.AddrPort `json:"gateway"`
	Inner    netip.Addr     `json:"inner"`
	Inner6   netip.Addr     `json:"inner6,omitzero"`
	MTU      int            `json:"mtu"`      // bytes, of inner packets
	DNS      []netip.Addr   `json:"dns"`      // resolvers behind the tunnel
	Carriage string         `json:"carriage"` // what carries the session: "TLS on TCP" or "HTTP/3"
	Since    time.Time      `json:"since"`    // when the present session opened
	Until    time.Time      `json:"until"`    // end of the certificate, when it closes
	Cipher   string         `json:"cipher"`
	Counters Counters       `json:"counters"`
}

// OfficeStatus describes the office that is proven.
type OfficeStatus struct {
	Site         string         `json:"site"`
	Beacon       netip.AddrPort `json:"beacon"`
	Link         string         `json:"link"`
	Networks     []netip.Prefix `json:"networks"` // reached over the LAN directly
	Since        time.Time      `json:"since"`
	StayInTunnel bool           `json:"stay_in_tunnel,omitempty"` // the organisation leaves the work domain in the tunnel
}

// Transition is one change of state.
type Transition struct {
	At     time.Time `json:"at"`
	State  State     `json:"state"`
	Reason string    `json:"reason"`
	Detail string    `json:"detail"`
}

// Status is the answer to GET /v1/status.
type Status struct {
	State   State     `json:"state"`
	Since   time.Time `json:"since"`
	Reason  string    `json:"reason"`            // code, empty when all is well
	Detail  string    `json:"detail"`            // one sentence
	Words   Words     `json:"words"`             // for the person at the laptop
	Uplink  Uplink    `json:"uplink"`            // the one in use
	Uplinks []Uplink  `json:"uplinks,omitempty"` // all there are, the one in use among them
	// Signals is the history of each radio's signal by the link's name, oldest
	// first, bounded: a sample for each change of 3 dB, and each minute at most
	// for a smaller one.
	Signals map[string][]SignalSample `json:"signals,omitempty"`
	// Unserved names network hardware that the kernel makes no link of.
	Unserved []Unserved    `json:"unserved,omitempty"`
	Tunnel   *TunnelStatus `json:"tunnel,omitempty"`
	Office   *OfficeStatus `json:"office,omitempty"`
	Device   string        `json:"device,omitempty"` // device id that attestd reports
	Access   *Access       `json:"access,omitempty"` // absent without wpa_supplicant
	History  []Transition  `json:"history"`          // oldest first, bounded
}

// Line is the status in one line for the console. It begins with the state and
// leaves out what changes by the second.
func (s Status) Line() string {
	switch s.State {
	case Linked:
		return fmt.Sprintf("Linked %s %s", s.Uplink.Name, s.Uplink.Addresses())
	case Tunnel:
		if s.Tunnel != nil {
			return fmt.Sprintf("Tunnel inner %s gateway %s", s.Tunnel.Inner, s.Tunnel.Gateway)
		}
	case Office:
		if s.Office != nil {
			return fmt.Sprintf("Office %s %s %s", s.Office.Site, s.Uplink.Name, s.Uplink.Address)
		}
	}
	return s.State.String() + " " + s.Detail
}
