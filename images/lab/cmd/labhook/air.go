//go:build lab

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/u-root/u-root/pkg/kmodule"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sekisho/hostos/boot"
	"sekisho/images/lab/hook"
)

// nl80211 commands and attributes (linux/nl80211.h).
const (
	cmdSetWiphyNetns = 49
	attrWiphy        = 1
	attrNetnsFD      = 219
)

// air puts an access point on the air, or takes it off: the first or the second
// one. Of three simulated radios one stays with the host domain, the others move
// into the namespace air, whose network card leads to the lab. A hook.Air in
// JSON comes on standard input.
func air(_ context.Context, args []string) error {
	if len(args) != 2 || args[1] != "1" && args[1] != "2" {
		return errors.New("usage: labhook air up|down 1|2")
	}
	number := int(args[1][0] - '0')
	switch args[0] {
	case "up":
		var a hook.Air
		if err := json.NewDecoder(io.LimitReader(os.Stdin, 64<<10)).Decode(&a); err != nil {
			return fmt.Errorf("access point: %w", err)
		}
		return airUp(number, a)
	case "down":
		return airDown(hook.AirDir(number))
	}
	return fmt.Errorf("air: %q: want up or down", args[0])
}

// opensslConf has hostapd's TLS do without OpenSSL's module of legacy
// algorithms, which is not in the image.
const opensslConf = "openssl_conf = openssl_init\n\n[openssl_init]\nproviders = provider_sect\n\n[provider_sect]\ndefault = default_sect\n\n[default_sect]\nactivate = 1\n"

func airUp(number int, a hook.Air) error {
	airDir := hook.AirDir(number)
	if err := errors.Join(os.MkdirAll(airDir, 0o700), airDown(airDir)); err != nil {
		return err
	}
	openssl := filepath.Join(airDir, "openssl.cnf")
	if err := os.WriteFile(openssl, []byte(opensslConf), 0o600); err != nil {
		return err
	}
	for name, text := range a.Files {
		if err := os.WriteFile(filepath.Join(airDir, filepath.Base(name)), []byte(text), 0o600); err != nil {
			return err
		}
	}
	p, err := kmodule.NewProber(kmodule.ProbeOpts{})
	if err != nil {
		return err
	}
	if _, err := os.Stat("/sys/module/mac80211_hwsim"); err != nil {
		for module, params := range map[string]string{"bridge": "", "mac80211_hwsim": "radios=3"} {
			if err := p.Probe(module, params); err != nil {
				return fmt.Errorf("module %s: %w", module, err)
			}
		}
		if err := moveRadios(); err != nil {
			return err
		}
	}
	var out []byte
	err = inAir(func() error {
		radio, err := prepareAir(number)
		if err != nil {
			return err
		}
		file := filepath.Join(airDir, "hostapd.conf")
		text := fmt.Sprintf("interface=%s\nbridge=br0\ndriver=nl80211\n%s", radio, a.Conf)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return err
		}
		hostapd := exec.Command("/usr/sbin/hostapd", "-B", "-P", filepath.Join(airDir, "pid"), "-f", filepath.Join(airDir, "log"), file)
		if len(a.Files) > 0 { // an authentication server, which speaks TLS
			hostapd.Env = append(os.Environ(), "OPENSSL_CONF="+openssl)
		}
		out, err = hostapd.CombinedOutput()
		return err
	})
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(airDir, "log"))
		return fmt.Errorf("%w: %s %s", err, out, log)
	}
	return nil
}

// airDown ends the access point of a directory, if there is one.
func airDown(airDir string) error {
	b, err := os.ReadFile(filepath.Join(airDir, "pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	for range 100 {
		if syscall.Kill(pid, 0) != nil {
			return nil
		}
		<-time.After(50 * time.Millisecond)
	}
	return fmt.Errorf("hostapd (process %d) does not end", pid)
}

// moveRadios moves all radios but the oldest into the namespace air.
func moveRadios() error {
	phys, err := filepath.Glob("/sys/class/ieee80211/phy*/index")
	if err != nil || len(phys) != 3 {
		return fmt.Errorf("radios %q, want three", phys)
	}
	var numbers []int
	for _, f := range phys {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			return err
		}
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	return errors.Join(moveRadio(numbers[1]), moveRadio(numbers[2]))
}

// moveRadio moves a radio into the namespace air.
func moveRadio(number int) error {
	family, err := netlink.GenlFamilyGet("nl80211")
	if err != nil {
		return fmt.Errorf("nl80211: %w", err)
	}
	ns, err := os.Open(boot.AirNetns)
	if err != nil {
		return err
	}
	defer ns.Close()
	req := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	req.AddData(&nl.Genlmsg{Command: cmdSetWiphyNetns, Version: 1})
	req.AddData(nl.NewRtAttr(attrWiphy, binary.NativeEndian.AppendUint32(nil, uint32(number))))
	req.AddData(nl.NewRtAttr(attrNetnsFD, binary.NativeEndian.AppendUint32(nil, uint32(ns.Fd()))))
	if _, err := req.Execute(unix.NETLINK_GENERIC, 0); err != nil {
		return fmt.Errorf("move radio %d: %w", number, err)
	}
	return nil
}

// prepareAir joins the card to a bridge, and returns the name of the first or
// second radio.
func prepareAir(number int) (radio string, err error) {
	var radios []string
	for _, f := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+f+"/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
	}
	snooping := false // it would join groups, and say so on the air
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &snooping}
	if err := netlink.LinkAdd(bridge); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", fmt.Errorf("bridge: %w", err)
	}
	br, err := netlink.LinkByName("br0")
	if err != nil {
		return "", err
	}
	links, err := netlink.LinkList()
	if err != nil {
		return "", err
	}
	for _, l := range links {
		switch {
		case l.Attrs().HardwareAddr.String() == boot.AirMAC && l.Type() == "device":
			if err := errors.Join(netlink.LinkSetMaster(l, br), netlink.LinkSetUp(l), netlink.LinkSetUp(br)); err != nil {
				return "", fmt.Errorf("bridge: %w", err)
			}
		case l.Attrs().EncapType == "ether" && strings.HasPrefix(l.Attrs().Name, "wlan"):
			radios = append(radios, l.Attrs().Name)
		}
	}
	if len(radios) != 2 {
		return "", fmt.Errorf("radios %q in the namespace air, want two", radios)
	}
	slices.Sort(radios)
	return radios[number-1], nil
}

// inAir runs f on a thread in the namespace air, which ends with it.
func inAir(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		ns, err := netns.GetFromPath(boot.AirNetns)
		if err == nil {
			err = netns.Set(ns)
			ns.Close()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}
