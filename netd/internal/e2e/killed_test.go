//go:build linux

package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
)

// The laptop's daemons, killed and started again. attestd's and linkd's are
// stand-ins; what netd sees of their end is the same: a socket that is gone,
// and with linkd the device work0. The real ones are killed in the lab.

func (w *world) killNetd() func() {
	w.kill(w.netd)
	if r := w.inside.Run("ip", "route"); strings.Contains(r, "tun0") || strings.Contains(r, "office0") {
		w.t.Errorf("a way out without netd: %s", r)
	}
	return w.startNetd
}

func (w *world) killAttestd() func() {
	w.attestd.stop()
	return func() {
		w.attestd.start()
		os.Chmod(w.path("attestd.sock"), 0o666)
	}
}

func (w *world) killLinkd() func() {
	w.unlink()
	return func() {
		w.linkd()
		os.Chmod(w.path("linkd.sock"), 0o666)
	}
}

// inEveryState takes the laptop through all states and kills the programs in
// each. What was up has to come back by itself.
func inEveryState(kill ...func(*world) func()) func(*testing.T, *world) {
	return func(t *testing.T, w *world) {
		for _, s := range []struct {
			state netd.State
			enter func()
		}{
			{netd.Dark, func() { w.home.Run("ip", "link", "set", "lan0", "down") }},
			{netd.Linked, func() { // an uplink, and nobody to attest
				w.attestd.set(gate.StateRefused, 0)
				w.home.Run("ip", "link", "set", "lan0", "up")
				w.startDHCP()
				w.waitState(60*time.Second, netd.Attesting, netd.ReasonAttestation)
				w.attestd.stop()
			}},
			{netd.Portal, func() {
				w.attestd.set(gate.StateAttesting, 0)
				w.portal()
				w.killAttestd()()
			}},
			{netd.Attesting, func() { w.home.Run("nft", "delete table ip portal; delete table ip evil") }},
			{netd.Tunnel, func() { w.attestd.set(gate.StateAffirming, time.Hour) }},
			{netd.Office, func() {
				w.desk.startBeacon(w.desk.officeCA)
				w.plug(w.home, w.desk.router)
			}},
			{netd.Tunnel, func() { w.plug(w.desk.router, w.home) }},
		} {
			s.enter()
			w.waitState(90*time.Second, s.state, "")
			var starts []func()
			for _, k := range kill {
				starts = append(starts, k(w))
			}
			<-time.After(100 * time.Millisecond) // as long as init's first pause
			for _, start := range starts {
				start()
			}
			if s.state == netd.Linked {
				w.attestd.stop()
			}
			w.waitState(90*time.Second, s.state, "")
		}
		w.readPage(30 * time.Second)
	}
}
