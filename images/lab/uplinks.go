package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"sekisho/images/lab/capture"
	"sekisho/images/lab/hook"
)

// uplinks.go plugs the laptop's ways to the Internet in and out: the cable, an
// access point (hostapd on a simulated radio inside the laptop, whose traffic
// comes out at the tap "air"), and an LTE stick (usb-net, at the tap "lte").

// Uplinks lists what Uplink can plug.
func Uplinks() []string { return []string{"wired", "wifi", "lte"} }

// Of the lab's access point.
const (
	WifiSSID       = "home"
	WifiPassphrase = "correct horse battery"
)

// accessPoint begins hostapd's configuration of a network.
func accessPoint(ssid string) string {
	return fmt.Sprintf("ssid=%s\nhw_mode=g\nchannel=1\nieee80211n=1\nwmm_enabled=1\ncountry_code=JP\n", ssid)
}

// WPA3 is hostapd's configuration of an access point with WPA3-Personal.
func WPA3(ssid, passphrase string) hook.Air {
	return hook.Air{Conf: accessPoint(ssid) + fmt.Sprintf("wpa=2\nwpa_key_mgmt=SAE\nrsn_pairwise=CCMP\nieee80211w=2\nsae_pwe=2\nsae_password=%s\n", passphrase)}
}

// HiddenWPA2 is that of an access point with WPA2-Personal that does not announce itself.
func HiddenWPA2(ssid, passphrase string) hook.Air {
	return hook.Air{Conf: accessPoint(ssid) + fmt.Sprintf("ignore_broadcast_ssid=1\nwpa=2\nwpa_key_mgmt=WPA-PSK\nrsn_pairwise=CCMP\nwpa_passphrase=%s\n", passphrase)}
}

// Uplink plugs an uplink in or out. The Wi-Fi network is saved in the laptop too.
func (l *Lab) Uplink(ctx context.Context, name string, up bool) error {
	switch name {
	case "wired":
		_, err := qmp(ctx, "set_link", map[string]any{"name": "uplink", "up": up})
		return err
	case "wifi":
		if !up {
			return errors.Join(l.AirDown(ctx, 1), l.AirDown(ctx, 2))
		}
		if err := l.AirUp(ctx, 1, WPA3(WifiSSID, WifiPassphrase)); err != nil {
			return err
		}
		return l.JoinWifi(ctx, WifiSSID, WifiPassphrase)
	case "lte":
		return l.stick(ctx, up)
	}
	return fmt.Errorf("lab: uplink %q: want one of %q", name, Uplinks())
}

// AirUp puts an access point on the air by the radio of a number, 1 or 2, in
// place of what was there.
func (l *Lab) AirUp(ctx context.Context, number int, a hook.Air) error {
	in, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return l.air(ctx, "up", number, in)
}

// AirDown takes the access point of a number off the air, if there is one.
func (l *Lab) AirDown(ctx context.Context, number int) error { return l.air(ctx, "down", number, nil) }

func (l *Lab) air(ctx context.Context, what string, number int, in []byte) error {
	return l.must(l.Call(ctx, hook.Request{Target: hook.Host, Timeout: time.Minute, Stdin: in, Argv: []string{"/bbin/labhook", "air", what, fmt.Sprint(number)}}))
}

// JoinWifi saves a network in the laptop, as a person at it would.
func (l *Lab) JoinWifi(ctx context.Context, ssid, passphrase string, flags ...string) error {
	return l.must(l.Call(ctx, hook.Request{Target: hook.Host, Timeout: time.Minute, Stdin: []byte(passphrase + "\n"), Argv: append([]string{"/bbin/netd", "wifi", "join", ssid}, flags...)}))
}

// must makes an error of a command's failure.
func (l *Lab) must(a hook.Response, err error) error {
	if err == nil && a.Exit != 0 {
		err = fmt.Errorf("lab: exit status %d: %s", a.Exit, strings.TrimSpace(string(a.Stderr)))
	}
	return err
}

// stick plugs the LTE stick in or pulls it out.
func (l *Lab) stick(ctx context.Context, in bool) error {
	if !in {
		if _, err := qmp(ctx, "device_del", map[string]any{"id": "stick"}); err != nil {
			return err
		}
		// The guest lets go of it first.
		return waitFor(ctx, "the stick to be pulled out", func() (bool, error) {
			_, err := qmp(ctx, "netdev_del", map[string]any{"id": "lte"})
			return err == nil, ctx.Err()
		})
	}
	if _, err := qmp(ctx, "netdev_add", map[string]any{"type": "tap", "id": "lte", "ifname": "lte", "script": "no", "downscript": "no"}); err != nil {
		return err
	}
	_, err := qmp(ctx, "device_add", map[string]any{"driver": "usb-net", "id": "stick", "netdev": "lte", "bus": "usb.0", "mac": "52:54:00:5e:c1:52"})
	return err
}

// scenarios are places that a laptop is in: which uplinks there are.
var scenarios = map[string][]string{
	"home":  {"wired", "wifi"},
	"cafe":  {"wifi"},
	"train": {"lte"},
	"desk":  {"wired"},
	"away":  nil,
}

// Scenarios lists what Scenario knows.
func Scenarios() []string { return slices.Sorted(maps.Keys(scenarios)) }

// Scenario plugs exactly the uplinks of a place in. What comes is plugged in
// before what goes is pulled out.
func (l *Lab) Scenario(ctx context.Context, name string) error {
	want, ok := scenarios[name]
	if !ok {
		return fmt.Errorf("lab: scenario %q: want one of %q", name, Scenarios())
	}
	var errs []error
	for _, u := range want {
		if err := l.Uplink(ctx, u, true); err != nil && !strings.Contains(err.Error(), "Duplicate") { // the stick is in
			errs = append(errs, err)
		}
	}
	for _, u := range Uplinks() {
		if slices.Contains(want, u) {
			continue
		}
		if err := l.Uplink(ctx, u, false); err != nil && !strings.Contains(err.Error(), "not found") { // it is out
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// CheckOthers judges every frame that the uplinks beside the cable have
// carried in this run, by the name of their captures.
func (l *Lab) CheckOthers() (map[string]capture.Report, error) {
	out := map[string]capture.Report{}
	for _, name := range []string{"air", "lte"} {
		allow := allowed()
		if name == "air" {
			allow.Wireless = true
			allow.Firmware, _ = net.ParseMAC(airMAC) // a constant
		}
		r, err := checkFile(l.run(name+".pcap"), allow)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		out[name] = r
	}
	return out, nil
}
