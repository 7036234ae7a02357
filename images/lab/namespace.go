package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const namespacePrefix = "sekisho-"

// places are the network namespaces, without their prefix.
var places = []string{"home", "site", "lgwan"}

// topology makes the namespaces' links, as arguments to ip(8). The uplink
// speaks no IPv6 of its own (see settings), so that every frame on it can be
// judged whoever sent it.
const topology = `
-n sekisho-home  link set lo up
-n sekisho-site  link set lo up
-n sekisho-lgwan link set lo up

-n sekisho-home  tuntap add dev uplink mode tap
-n sekisho-home  address add 192.168.50.1/24 dev uplink

-n sekisho-home  link add site0 type veth peer name home0 netns sekisho-site
-n sekisho-home  address add 203.0.113.1/24 dev site0
-n sekisho-site  address add 203.0.113.10/24 dev home0
-n sekisho-site  address add 203.0.113.20/24 dev home0
-n sekisho-home  link set site0 up
-n sekisho-site  link set home0 up
-n sekisho-site  route add 192.168.50.0/24 via 203.0.113.1
-n sekisho-site  route add 10.20.0.0/24 via 203.0.113.1

-n sekisho-site  link add lgwan0 type veth peer name site0 netns sekisho-lgwan
-n sekisho-site  address add 10.254.0.1/24 dev lgwan0
-n sekisho-lgwan address add 10.254.0.80/24 dev site0
-n sekisho-site  link set lgwan0 up
-n sekisho-lgwan link set site0 up
-n sekisho-lgwan route add 10.80.0.0/16 via 10.254.0.1
-n sekisho-site  address add fd00:254::1/64 dev lgwan0 nodad
-n sekisho-lgwan address add fd00:254::80/64 dev site0 nodad
-n sekisho-lgwan route add fd00:80::/112 via fd00:254::1

-n sekisho-home  tuntap add dev air mode tap
-n sekisho-home  address add 192.168.60.1/24 dev air
-n sekisho-home  tuntap add dev lte mode tap
-n sekisho-home  address add 192.168.70.1/24 dev lte
-n sekisho-site  route add 192.168.60.0/24 via 203.0.113.1
-n sekisho-site  route add 192.168.70.0/24 via 203.0.113.1

-n sekisho-home  link set uplink up
-n sekisho-home  link set air up
-n sekisho-home  link set lte up
`

// settings are written below /proc/sys of each namespace, before its links.
var settings = map[string][]string{
	"home":  {"net/ipv6/conf/all/disable_ipv6=1", "net/ipv6/conf/default/disable_ipv6=1", "net/ipv4/ip_forward=1"},
	"site":  {"net/ipv6/conf/default/accept_ra=0", "net/ipv4/ip_forward=1"},
	"lgwan": {"net/ipv6/conf/default/accept_ra=0"},
}

// siteRules keep LGWAN out of reach from home: only what came out of the
// gateway's tunnels is passed on.
const siteRules = `
table inet lab {
	chain forward {
		type filter hook forward priority filter; policy drop;
		iifname { "home0", "lgwan0" } oifname { "home0", "lgwan0" } drop
		oifname "lgwan0" accept
		iifname "lgwan0" accept
	}
}
`

// command runs a tool and returns an error with what it said.
func command(ctx context.Context, stdin string, argv ...string) error {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Stdin = strings.NewReader(stdin)
	out, err := c.CombinedOutput()
	if err != nil {
		return fmt.Errorf("lab: %s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// makeNamespaces builds the surroundings out of nothing.
func makeNamespaces(ctx context.Context) error {
	for _, place := range places {
		if err := command(ctx, "", "ip", "netns", "add", namespacePrefix+place); err != nil {
			return err
		}
		err := inNamespace(namespacePrefix+place, func() error {
			for _, s := range settings[place] {
				key, value, _ := strings.Cut(s, "=")
				if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
					return fmt.Errorf("lab: %s in %s: %w", s, place, err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for line := range strings.Lines(topology) {
		if args := strings.Fields(line); len(args) > 0 {
			if err := command(ctx, "", append([]string{"ip"}, args...)...); err != nil {
				return err
			}
		}
	}
	return command(ctx, siteRules, "ip", "netns", "exec", namespacePrefix+"site", "nft", "-f", "-")
}

// clearNamespaces removes the namespaces that exist.
func clearNamespaces(ctx context.Context) error {
	var errs []error
	for _, place := range places {
		if _, err := os.Stat(filepath.Join("/run/netns", namespacePrefix+place)); err == nil {
			errs = append(errs, command(ctx, "", "ip", "netns", "del", namespacePrefix+place))
		}
	}
	return errors.Join(errs...)
}

// inNamespace runs f on a thread inside the named network namespace; a process
// that f starts is in it too. Empty means the one that we are in. The thread is
// not used for anything after it.
func inNamespace(name string, f func() error) error {
	if name == "" {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := os.Open(filepath.Join("/run/netns", name))
		if err != nil {
			done <- fmt.Errorf("lab: %w", err)
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("lab: enter %s: %w", name, err)
			return
		}
		done <- f()
	}()
	return <-done
}
