//go:build linux

package daemon

import (
	"context"
	"net/netip"
	"time"

	"sekisho/netd"
	"sekisho/netd/kernel"
	"sekisho/netd/office"
)

// Pipe is the work domain's way to the office's LAN: office.Pipe.
type Pipe interface {
	Open(until time.Time, still func() bool)
}

// watchOffice looks for beacons on the paths that the loop gives.
func (d *Daemon) watchOffice(ctx context.Context) {
	if d.Organization.Office == nil {
		return
	}
	w := office.Watcher{
		Office: d.Organization.Office, KeyAgreement: d.Organization.KeyAgreement, Credential: d.Attestation.Credential, Neighbour: kernel.Neighbour, Log: d.Log,
		Report: func(f office.Finding) { d.update(func(r *reports) { r.office = f }) },
	}
	w.Run(ctx, d.paths)
}

// still reports, while packets go to an office, whether the link's carrier has
// neither come nor gone since the proof: the loop may not have heard of it yet.
func still(p office.Path) func() bool {
	return func() bool {
		flaps, err := kernel.Flaps(p.Index)
		return err == nil && flaps == p.Flaps
	}
}

// path is where an office may be, IPv4 alone: none unless attestation opens its gate. It
// differs after each loss of the carrier, however short, so that a proof never
// outlives the cable that it came through.
func (l *loop) path(affirming bool) office.Path {
	u := l.in.uplink
	if !affirming || !u.Usable() || !u.Address.IsValid() || l.d.Organization.Office == nil {
		return office.Path{}
	}
	for _, k := range l.outside {
		if k.Name == u.Name {
			return office.Path{Link: k.Name, Index: k.Index, Flaps: k.Flaps, Address: u.Address, Hardware: k.Hardware.String()}
		}
	}
	return office.Path{}
}

// proven returns the proof in force at now for the present path.
func (l *loop) proven(affirming bool, now time.Time) (office.Proof, bool) {
	p := l.in.office.Proof
	ok := p.Site != "" && !office.Over(p.Until, now) && p.Path == l.path(affirming)
	return p, ok
}

// officeStatus describes the proof in force at now.
func (l *loop) officeStatus(p office.Proof, was *netd.OfficeStatus, now time.Time) *netd.OfficeStatus {
	s := &netd.OfficeStatus{Site: p.Site, Beacon: p.Beacon, Networks: p.Networks, Link: p.Path.Link, Since: now}
	if l.d.Organization.Office.StayInTunnel {
		s.StayInTunnel = true
	}
	if was != nil && was.Site == s.Site && was.Link == s.Link {
		s.Since = was.Since
	}
	return s
}

// beacons are all of the organisation's.
func (d *Daemon) beacons() (out []netip.AddrPort) {
	if d.Organization.Office != nil {
		for _, b := range d.Organization.Office.Beacons {
			out = append(out, b.Address)
		}
	}
	return out
}
