package uplink

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"slices"

	"sekisho/netd"
)

// Link is a wired link that may become the uplink.
type Link struct {
	Index    int
	Name     string
	Hardware net.HardwareAddr
	Carrier  bool
}

// Choose returns the link to use: the present one while it has carrier, else
// the first with carrier, else the first. ok is false if there is none.
func Choose(links []Link, present string) (l Link, ok bool) {
	best := slices.MinFunc(append([]Link{{Index: -1}}, links...), func(a, b Link) int {
		return cmp.Or(rank(a, present)-rank(b, present), a.Index-b.Index)
	})
	return best, best.Index != -1
}

func rank(l Link, present string) int {
	switch {
	case l.Index == -1:
		return 3 // stands for no link at all
	case l.Carrier && l.Name == present:
		return 0
	case l.Carrier:
		return 1
	}
	return 2
}

// Manager keeps the best link's lease. Make one with New.
type Manager struct {
	report func(netd.Uplink)
	lease  leaser
}

// leaser keeps a lease on a link and reports it until ctx is done.
type leaser func(ctx context.Context, l Link, previous netip.Addr, report func(netd.Uplink))

// Run follows the links that arrive on links until ctx is done.
func (m *Manager) Run(ctx context.Context, links <-chan []Link) {
	var present Link
	var address netip.Addr // the last one had on present, to ask for again
	stop := func() {}
	defer func() { stop() }()
	m.report(netd.Uplink{Reason: netd.ReasonNoLink, Detail: "no Ethernet link"})
	for {
		var list []Link
		select {
		case <-ctx.Done():
			return
		case list = <-links:
		}
		l, ok := Choose(list, present.Name)
		if ok == (present.Name != "") && l.Index == present.Index && l.Name == present.Name && l.Carrier == present.Carrier {
			continue
		}
		stop() // no report comes from the old link's goroutine after this
		stop = func() {}
		if l.Index != present.Index {
			address = netip.Addr{}
		}
		switch {
		case !ok:
			present = Link{}
			m.report(netd.Uplink{Reason: netd.ReasonNoLink, Detail: "no Ethernet link"})
			continue
		case !l.Carrier:
			m.report(netd.Uplink{Name: l.Name, Reason: netd.ReasonNoCarrier, Detail: "no carrier on " + l.Name})
		default:
			ctx, cancel := context.WithCancel(ctx)
			done := make(chan struct{})
			previous := address
			go func() {
				defer close(done)
				m.lease(ctx, l, previous, func(u netd.Uplink) {
					if u.Usable() {
						address = u.Address.Addr()
					}
					m.report(u)
				})
			}()
			stop = func() { cancel(); <-done }
		}
		present = l
	}
}
