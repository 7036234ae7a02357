//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// TestTwoGateways kills the gateway in use: the session is on the other within
// 5 s. Each gateway has leases of its own here, so the inner address is another
// one there, and connections of the work domain begin anew.
func TestTwoGateways(t *testing.T) {
	w := newWorld(t)
	second := nstest.New(t, "site2")
	nstest.Pair(w.home, "wan1", "198.51.100.1/24", second, "wan0", "198.51.100.20/24")
	second.Run("ip", "route", "add", "192.168.50.0/24", "via", "198.51.100.1")
	nstest.Pair(second, "lgwan0", "10.1.1.1/24", w.web, "eth1", "10.1.1.80/24")
	second.Run("ip", "route", "add", "10.1.0.80/32", "via", "10.1.1.80")
	w.web.Run("ip", "route", "add", "10.81.0.0/16", "via", "10.1.1.1")
	const other = "198.51.100.20:443"
	w.organization.Gateways = append(w.organization.Gateways, attest.Endpoint{Address: netip.MustParseAddrPort(other), ServerName: "gateway.test"})
	text, err := os.ReadFile(w.path("gateway.json"))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	config["listen"], config["pool"], config["leases"], config["status"] = other, "10.81.0.0/16", w.path("leases2.json"), w.path("gateway2.sock")
	w.write("gateway2.json", config)

	w.startGateway()
	gateways := map[string]interface{ Kill() error }{gatewayAddr: w.gateway.Process}
	gateways[other] = second.Start(filepath.Join(programs, "gateway"), "serve", "-config", w.path("gateway2.json")).Process
	for address, ns := range map[string]*nstest.NS{gatewayAddr: w.site, other: second} { // both answer before the choice
		nstest.Eventually(t, 10*time.Second, func() error {
			return ns.Do(func() error {
				c, err := net.DialTimeout("tcp", address, time.Second)
				if err == nil {
					c.Close()
				}
				return err
			})
		})
	}
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()
	first := w.waitState(40*time.Second, netd.Tunnel, "").Tunnel
	w.readPage(10 * time.Second)

	start := time.Now()
	if err := gateways[first.Gateway.String()].Kill(); err != nil {
		t.Fatal(err)
	}
	var moved netd.TunnelStatus
	nstest.Eventually(t, 25*time.Second, func() error {
		s, err := w.status()
		if err == nil && (s.State != netd.Tunnel || s.Tunnel == nil || s.Tunnel.Gateway == first.Gateway) {
			err = fmt.Errorf("still %s", s.Line())
		}
		if err == nil {
			moved = *s.Tunnel
		}
		return err
	})
	open := time.Since(start)
	w.readPage(10 * time.Second)
	t.Logf("from %s (inner %s) to %s (inner %s) after %v, a page after %v", first.Gateway, first.Inner, moved.Gateway, moved.Inner,
		open.Round(10*time.Millisecond), time.Since(start).Round(10*time.Millisecond))
	if open > 5*time.Second {
		t.Errorf("on the other gateway after %v, want 5 s at most", open)
	}
	w.judge()
}
