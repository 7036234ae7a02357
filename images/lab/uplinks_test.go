package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sekisho/images/lab/hook"
	"sekisho/netd"
)

// network asks netd.
func (b *bench) network(ctx context.Context) (s netd.Status, err error) {
	d, err := b.Daemon(ctx, "netd")
	if err == nil {
		err = json.Unmarshal(d.Body, &s)
	}
	return s, err
}

// untilUplink waits until the tunnel is open over an uplink of a kind.
func (b *bench) untilUplink(t *testing.T, kind string) netd.Uplink {
	t.Helper()
	var s netd.Status
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("netd said last: %+v", s)
		}
	})
	b.until(t, "a tunnel over "+kind, func(ctx context.Context) bool {
		got, err := b.network(ctx)
		if err == nil {
			s = got
		}
		return err == nil && s.State == netd.Tunnel && s.Uplink.Kind == kind && s.Uplink.Usable()
	})
	return s.Uplink
}

// untilReady waits until an uplink of a kind is ready, in use or not, as holds wants it.
func (b *bench) untilReady(t *testing.T, kind string, holds func(netd.Uplink) bool) (u netd.Uplink) {
	t.Helper()
	var last []netd.Uplink
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the uplinks were last: %+v", last)
		}
	})
	b.until(t, "an uplink by "+kind, func(ctx context.Context) bool {
		s, err := b.network(ctx)
		if err != nil {
			return false
		}
		last = s.Uplinks
		i := slices.IndexFunc(s.Uplinks, func(u netd.Uplink) bool { return u.Kind == kind && holds(u) })
		if i >= 0 {
			u = s.Uplinks[i]
		}
		return i >= 0
	})
	return u
}

// untilNetwork waits until the radio has an address in a network, and returns
// how long that took.
func (b *bench) untilNetwork(t *testing.T, ssid string) time.Duration {
	t.Helper()
	begin := time.Now()
	u := b.untilReady(t, netd.KindWifi, func(u netd.Uplink) bool {
		return u.Usable() && u.Health == netd.HealthGood && u.Network == ssid
	})
	took := time.Since(begin)
	t.Logf("%s in %q at %d dBm, %s, seen after %.1f s", u.Name, u.Network, u.Signal, u.Address, took.Seconds())
	return took
}

// wifi runs "netd wifi".
func (b *bench) wifi(t *testing.T, args ...string) string {
	t.Helper()
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Timeout: time.Minute, Argv: append([]string{"/bbin/netd", "wifi"}, args...)})
	if must(t, err); a.Exit != 0 {
		t.Fatalf("netd wifi %s: exit status %d: %s", args, a.Exit, a.Stderr)
	}
	return string(a.Stdout)
}

// untilKept waits until saved networks and the network identity would outlive
// a power cut.
func (b *bench) untilKept(t *testing.T) netd.Access {
	t.Helper()
	var last *netd.Access
	b.until(t, "networks and identity to be kept", func(ctx context.Context) bool {
		s, err := b.network(ctx)
		last = s.Access
		return err == nil && last != nil && last.State == netd.AccessKept && last.Identity != ""
	})
	return *last
}

const cafeSSID = "cafe"

// TestUplinks is one laptop with cable, Wi-Fi and an LTE stick that come and go,
// over two boots.
func TestUplinks(t *testing.T) {
	b := realLab(t)
	if _, err := b.Up(t.Context(), Boot{}); err != nil {
		t.Fatal(err)
	}
	plug := func(name string, up bool) { t.Helper(); must(t, b.Uplink(t.Context(), name, up)) }
	sound := func(u netd.Uplink) bool { return u.Usable() && u.Health == netd.HealthGood }
	b.untilUplink(t, netd.KindWired)
	b.scenario(t, "LTE stick plugged in, cable pulled", func(t *testing.T) {
		plug("lte", true)
		u := b.untilReady(t, netd.KindUSB, sound)
		t.Logf("%s by %s, %s", u.Name, u.Driver, u.Address)
		begin := time.Now()
		plug("wired", false)
		b.untilUplink(t, netd.KindUSB)
		t.Logf("the other uplink was seen in use after %.1f s", time.Since(begin).Seconds())
	})
	b.scenario(t, "cable back", func(t *testing.T) {
		plug("wired", true)
		b.untilUplink(t, netd.KindWired)
	})
	b.scenario(t, "Wi-Fi with a wrong passphrase", func(t *testing.T) {
		must(t, b.AirUp(t.Context(), 1, WPA3(WifiSSID, WifiPassphrase)))
		must(t, b.JoinWifi(t.Context(), WifiSSID, "not the passphrase"))
		u := b.untilReady(t, netd.KindWifi, func(u netd.Uplink) bool { return u.Reason == netd.ReasonWrongSecret })
		t.Log(u.Detail)
	})
	b.scenario(t, "Wi-Fi with WPA3, cable pulled", func(t *testing.T) {
		must(t, b.JoinWifi(t.Context(), WifiSSID, WifiPassphrase))
		u := b.untilReady(t, netd.KindWifi, sound)
		t.Logf("%s joined %q at %d dBm, %s", u.Name, u.Network, u.Signal, u.Address)
		if u.Network != WifiSSID || u.Signal >= 0 {
			t.Errorf("network %q at %d dBm", u.Network, u.Signal)
		}
		a, err := b.Exec(t.Context(), hook.Host, "/bbin/netd", "wifi", "list")
		if err != nil || a.Exit != 0 {
			t.Errorf("netd wifi list: %+v, %v", a, err)
		}
		t.Logf("netd wifi list:\n%s", a.Stdout)
		plug("wired", false)
		b.untilUplink(t, netd.KindWifi) // before the stick, by the order
	})
	b.scenario(t, "roam to the other access point", func(t *testing.T) {
		first := b.untilUplink(t, netd.KindWifi).AccessPoint
		must(t, b.AirUp(t.Context(), 2, WPA3(WifiSSID, WifiPassphrase)))
		begin := time.Now()
		must(t, b.AirDown(t.Context(), 1))
		u := b.untilReady(t, netd.KindWifi, func(u netd.Uplink) bool {
			return u.Usable() && u.Network == WifiSSID && u.AccessPoint != "" && u.AccessPoint != first
		})
		t.Logf("from %s to %s, seen after %.1f s", first, u.AccessPoint, time.Since(begin).Seconds())
		b.untilUplink(t, netd.KindWifi)
	})
	b.scenario(t, "access point gone: the stick", func(t *testing.T) {
		plug("wifi", false)
		b.untilUplink(t, netd.KindUSB)
	})
	b.scenario(t, "everything gone, cable back", func(t *testing.T) {
		plug("lte", false)
		b.untilState(t, "netd", "Dark", "")
		b.noPage(t)
		plug("wired", true)
		b.untilUplink(t, netd.KindWired)
	})
	// What the work domain sends meanwhile would end with the power.
	b.bootStep(t, "power cut, no cable: the saved network comes back, the forgotten one does not", func(t *testing.T) {
		must(t, b.JoinWifi(t.Context(), cafeSSID, "another passphrase", "--hidden"))
		b.wifi(t, "forget", WifiSSID)
		a := b.untilKept(t)
		t.Logf("identity %s until %s", a.Identity, a.IdentityUntil)
		must(t, b.Cut(t.Context()))
		_, err := b.Again(t.Context(), Boot{Stay: true})
		must(t, err)
		// The firmware takes longer than this.
		b.until(t, "the cable to be out", func(ctx context.Context) bool { return b.Uplink(ctx, "wired", false) == nil })
		b.untilState(t, "netd", "Dark", "")
		must(t, b.AirUp(t.Context(), 1, HiddenWPA2(cafeSSID, "another passphrase")))
		b.untilNetwork(t, cafeSSID)
		b.untilUplink(t, netd.KindWifi)
		list := b.wifi(t, "list")
		t.Logf("netd wifi list:\n%s", list)
		if !strings.Contains(list, strconv.Quote(cafeSSID)) || strings.Contains(list, strconv.Quote(WifiSSID)) {
			t.Errorf("want %s and not %s:\n%s", cafeSSID, WifiSSID, list)
		}
		b.untilWork(t)
		b.untilPage(t)
	})
	b.scenario(t, "the organisation's Wi-Fi: EAP-TLS with the kept identity", func(t *testing.T) {
		city, err := b.Enterprise(2)
		must(t, err)
		must(t, b.AirUp(t.Context(), 2, city))
		must(t, b.AirDown(t.Context(), 1))
		b.untilNetwork(t, CitySSID)
		b.untilUplink(t, netd.KindWifi)
	})
	b.scenario(t, "a switch that asks for 802.1X", func(t *testing.T) {
		plug("wifi", false)
		must(t, b.GuardPort(t.Context()))
		plug("wired", true)
		b.until(t, "the switch to let the laptop in", func(context.Context) bool {
			in, err := b.PortAuthenticated()
			return err == nil && in
		})
		b.noPage(t)
		must(t, b.OpenPort(t.Context()))
		b.untilUplink(t, netd.KindWired)
	})
	b.cleanUplink(t, true)
	others, err := b.CheckOthers()
	must(t, err)
	for name, r := range others {
		t.Logf("SCENARIO %-40s leaked %d (%s)", fmt.Sprintf("all that the uplink %s carried", name), r.Leaked, &r)
		if !r.Clean() || r.Flows[gatewayAddress.String()] == 0 {
			t.Errorf("%s: %d frames, leaks %v", name, r.Frames, r.Leaks)
		}
	}
}
