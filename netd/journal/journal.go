// Package journal keeps what has happened to the network lately, for the help
// desk: changes of uplink, MTU, radio, tunnel, office, clock and state, each with
// its moment and in words. It holds nothing of what was carried, and no name
// of a network that the user joined.
package journal

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"sekisho/netd"
)

// Size bounds a Journal's events; the oldest go first.
const Size = 1000

// Kind is what an event is about.
type Kind string

// The kinds.
const (
	State  Kind = "state"
	Uplink Kind = "uplink"
	MTU    Kind = "mtu"
	Radio  Kind = "radio"
	Tunnel Kind = "tunnel"
	Office Kind = "office"
	Clock  Kind = "clock"
)

// Event is one thing that happened.
type Event struct {
	At   time.Time `json:"at"`
	Kind Kind      `json:"kind"`
	Code string    `json:"code"` // one word for programs
	EN   string    `json:"en"`
	JA   string    `json:"ja"`
}

// Journal is a bounded list of events. The zero value is empty and ready; it
// is safe for concurrent use.
type Journal struct {
	mu      sync.Mutex
	events  []Event
	dropped int
}

// Report is the answer to GET /v1/journal.
type Report struct {
	Saved   time.Time `json:"saved"`
	Dropped int       `json:"dropped"` // older events that there was no room for
	Events  []Event   `json:"events"`  // oldest first
}

// Add appends events.
func (j *Journal) Add(events ...Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.events = append(j.events, events...)
	if over := len(j.events) - Size; over > 0 {
		j.dropped += over
		j.events = slices.Delete(j.events, 0, over)
	}
}

// Report returns what the journal holds.
func (j *Journal) Report(now time.Time) Report {
	j.mu.Lock()
	defer j.mu.Unlock()
	return Report{Saved: now, Dropped: j.dropped, Events: slices.Clone(j.events)}
}

// radioStep is how much the signal has to change to be an event, in dB.
const radioStep = 10

// Diff says what happened between two looks at the status.
func Diff(a, b netd.Status, now time.Time) (events []Event) {
	add := func(k Kind, code, en, ja string) {
		events = append(events, Event{At: now, Kind: k, Code: code, EN: en, JA: ja})
	}
	for _, u := range b.Uplinks {
		was := netd.Uplink{Name: u.Name}
		if i := slices.IndexFunc(a.Uplinks, func(x netd.Uplink) bool { return x.Name == u.Name }); i >= 0 {
			was = a.Uplinks[i]
		}
		uplink(was, u, add)
	}
	for _, u := range a.Uplinks {
		if !slices.ContainsFunc(b.Uplinks, func(x netd.Uplink) bool { return x.Name == u.Name }) {
			add(Uplink, "gone", u.Name+" is gone", u.Name+" がなくなりました")
		}
	}
	if a.Uplink.Name != b.Uplink.Name && b.Uplink.Name != "" {
		add(Uplink, "in-use", fmt.Sprintf("%s is in use (before: %s)", b.Uplink.Name, dash(a.Uplink.Name)), fmt.Sprintf("%s を使用（以前: %s）", b.Uplink.Name, dash(a.Uplink.Name)))
	}
	session(a.Tunnel, b.Tunnel, add)
	switch {
	case a.Office == nil && b.Office != nil:
		add(Office, "proven", fmt.Sprintf("site %s proven by %s", b.Office.Site, b.Office.Beacon), fmt.Sprintf("拠点 %s を確認（%s）", b.Office.Site, b.Office.Beacon))
	case a.Office != nil && b.Office == nil:
		add(Office, "lost", "no proof of site "+a.Office.Site+" any more", "拠点 "+a.Office.Site+" の確認ができなくなりました")
	}
	if a.State != b.State || a.Reason != b.Reason {
		w := b.Say()
		en := b.State.String() + ": " + w.EN
		if b.Detail != "" {
			en += " (" + b.Detail + ")"
		}
		add(State, b.State.String(), en, b.State.String()+": "+w.JA)
	}
	return events
}

func uplink(a, b netd.Uplink, add func(k Kind, code, en, ja string)) {
	switch {
	case !a.Usable() && b.Usable():
		add(Uplink, "usable", fmt.Sprintf("%s (%s) has the address %s", b.Name, dash(b.Kind), b.Addresses()), fmt.Sprintf("%s（%s）のアドレスは %s", b.Name, dash(b.Kind), b.Addresses()))
	case a.Usable() && !b.Usable(), a.Reason != b.Reason && b.Reason != "":
		add(Uplink, "unusable", fmt.Sprintf("%s: %s (%s)", b.Name, dash(b.Reason), b.Detail), fmt.Sprintf("%s: 使用できません（%s）", b.Name, dash(b.Reason)))
	case a.Usable() && (a.Address != b.Address || a.Address6 != b.Address6):
		add(Uplink, "address", fmt.Sprintf("%s has the address %s", b.Name, b.Addresses()), fmt.Sprintf("%s のアドレスは %s", b.Name, b.Addresses()))
	}
	if a.Health != b.Health && b.Health != netd.HealthUnknown {
		add(Uplink, "health-"+b.Health, fmt.Sprintf("%s is %s", b.Name, b.Health), fmt.Sprintf("%s の状態: %s", b.Name, b.Health))
	}
	if b.Usable() && a.MTU != b.MTU {
		add(MTU, "uplink", fmt.Sprintf("%s carries packets of %d bytes", b.Name, b.MTU), fmt.Sprintf("%s の MTU は %d バイト", b.Name, b.MTU))
	}
	switch {
	case a.Network != b.Network && b.Network != "":
		add(Radio, "joined", fmt.Sprintf("%s joined a Wi-Fi network, signal %d dBm", b.Name, b.Signal), fmt.Sprintf("%s が Wi-Fi に接続（電波 %d dBm）", b.Name, b.Signal))
	case a.Network != "" && b.Network == "":
		add(Radio, "left", b.Name+" left its Wi-Fi network", b.Name+" が Wi-Fi から切断")
	case b.Network != "" && a.Signal/radioStep != b.Signal/radioStep:
		add(Radio, "signal", fmt.Sprintf("%s: signal %d dBm", b.Name, b.Signal), fmt.Sprintf("%s: 電波 %d dBm", b.Name, b.Signal))
	}
}

func session(a, b *netd.TunnelStatus, add func(k Kind, code, en, ja string)) {
	switch {
	case b == nil && a != nil:
		add(Tunnel, "closed", fmt.Sprintf("tunnel to %s closed", a.Gateway), fmt.Sprintf("トンネル（%s）を切断", a.Gateway))
	case b != nil && (a == nil || !a.Since.Equal(b.Since)):
		add(Tunnel, "open", fmt.Sprintf("tunnel to %s open, inner address %s, until %s", b.Gateway, b.Inner, b.Until.UTC().Format(time.RFC3339)), fmt.Sprintf("トンネル（%s）を接続、内部アドレス %s", b.Gateway, b.Inner))
		if a == nil || a.MTU != b.MTU {
			add(MTU, "tunnel", fmt.Sprintf("the tunnel carries packets of %d bytes", b.MTU), fmt.Sprintf("トンネルの MTU は %d バイト", b.MTU))
		}
	case b != nil && a != nil && a.MTU != b.MTU:
		add(MTU, "tunnel", fmt.Sprintf("the tunnel carries packets of %d bytes", b.MTU), fmt.Sprintf("トンネルの MTU は %d バイト", b.MTU))
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
