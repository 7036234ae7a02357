// Package netd is the vocabulary of the laptop's network: the states, the
// facts that they follow from, and the status that people and programs read.
// It does no I/O.
//
// The states, the zero value closed:
//
//	Dark ──► Linked ──► Attesting ──► Tunnel ◄──► Office
//	  ▲         └──► Portal ──┘         │            │
//	  └──────────────── any fault ──────┴────────────┘
//
// Nothing moves along these arrows by itself: Next derives the state from the
// facts that hold now, and an event means only "derive it again".
package netd

import (
	"fmt"

	"sekisho/guestlink"
)

// Names of the two devices in the namespace inside.
const (
	WorkLink   = guestlink.WorkLink // the work domain's packets; made by linkd
	TunnelLink = "tun0"             // the tunnel's end; made by netd
	OfficeLink = "office0"          // the way to the office's LAN; made by netd
)

// OfficeOuterLink is the outer end of OfficeLink, outside.
const OfficeOuterLink = "office1"

// State says how far the network is open.
type State uint8

// The states, the more open the higher.
const (
	// Dark: no usable uplink, or the kernel does not hold what was planned.
	Dark State = 0
	// Linked: an uplink has a sound lease; attestation is not under way.
	Linked State = 1
	// Portal: somebody else answers in place of the organisation's servers, as
	// a hotel's sign-in page does. Closed.
	Portal State = 2
	// Attesting: papers are shown. The verifier has not granted a credential
	// yet, or the gateway has not opened the tunnel for it yet.
	Attesting State = 3
	// Tunnel: the work domain's packets go through the tunnel, and nowhere else.
	Tunnel State = 4
	// Office: the LAN is proven to be an office of the organisation's. The work
	// domain reaches its networks directly, one-to-one translated, and all else
	// through the tunnel as in the state Tunnel, while a session is open.
	Office State = 5
)

// states lists them all.
func states() []State { return []State{Dark, Linked, Portal, Attesting, Tunnel, Office} }

func (s State) String() string {
	switch s {
	case Dark:
		return "Dark"
	case Linked:
		return "Linked"
	case Portal:
		return "Portal"
	case Attesting:
		return "Attesting"
	case Tunnel:
		return "Tunnel"
	case Office:
		return "Office"
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// ParseState is the inverse of State.String.
func ParseState(s string) (State, error) {
	for _, st := range states() {
		if st.String() == s {
			return st, nil
		}
	}
	return Dark, fmt.Errorf("unknown network state %q", s)
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *State) UnmarshalText(b []byte) (err error) {
	*s, err = ParseState(string(b))
	return err
}

// Facts is all that a State follows from. The zero value is the closed one:
// what is not known to be true is false.
type Facts struct {
	// Sealed: the kernel was read back and holds the last plan.
	Sealed bool
	// Uplink: a link has carrier and a sound lease.
	Uplink bool
	// Asked: attestd answers.
	Asked bool
	// Affirming: attestation opens the tunnel's gate now (gate.Open).
	Affirming bool
	// Session: a tunnel session is open and has assigned an inner address.
	Session bool
	// Office: a proof is in force that the uplink's LAN is an office, the inner
	// address is known, and the organisation wants to leave the tunnel there.
	Office bool
	// Portal: on this uplink others answer in place of the organisation's
	// servers, and none of these does. It never opens anything.
	Portal bool
}

// Next derives the state. It is total. Tunnel and Office take every fact but
// Asked: they outlive attestd's restart until the credential lapses.
func Next(f Facts) State {
	switch {
	case !f.Sealed, !f.Uplink:
		return Dark
	case f.Affirming && f.Office:
		return Office
	case f.Affirming && f.Session:
		return Tunnel
	case f.Portal:
		return Portal
	case f.Affirming, f.Asked:
		return Attesting
	}
	return Linked
}
