package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
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

// TestUplinks is one boot with cable, Wi-Fi and an LTE stick that come and go.
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
		must(t, b.air(t.Context(), "up", AccessPoint(WifiSSID, WifiPassphrase)))
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
	others, err := b.CheckOthers()
	must(t, err)
	for name, r := range others {
		t.Logf("SCENARIO %-40s leaked %d (%s)", fmt.Sprintf("all that the uplink %s carried", name), r.Leaked, &r)
		if !r.Clean() || r.Flows[gatewayAddress.String()] == 0 {
			t.Errorf("%s: %d frames, leaks %v", name, r.Frames, r.Leaks)
		}
	}
}
