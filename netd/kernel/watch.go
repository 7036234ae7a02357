//go:build linux

package kernel

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Link is a network device as the kernel reports it.
type Link struct {
	Index    int
	Name     string
	Hardware net.HardwareAddr
	Ethernet bool // an Ethernet device, real or one end of a veth pair
	// Flaps is how often the carrier came or went since the device was made
	// (IFLA_CARRIER_CHANGES, linux/if_link.h): between two looks at Carrier the
	// cable may have been in another LAN.
	Flaps uint32
	// Carrier: the far end is there, and packets may pass (IFF_LOWER_UP and not
	// IFF_DORMANT, netdevice(7)); only known of a link that is up.
	Carrier bool
	Kind    string // of an Ethernet link: netd.KindWired, KindWifi or KindUSB
	Driver  string // the kernel's name of it
	Device  string // vendor and product of a USB device, "12d1:14db"
}

// Links lists the devices of the namespace but the loopback device.
func (n *Namespace) Links() ([]Link, error) {
	list, err := n.link.LinkList()
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: links: %w", n.path, err)
	}
	flaps, err := n.flaps()
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: carrier changes: %w", n.path, err)
	}
	var out []Link
	for _, l := range list {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 {
			continue
		}
		kind := l.Type() // "device" is a driver's own, as opposed to bridges, tunnels and the like
		k := Link{
			Index: a.Index, Name: a.Name, Hardware: a.HardwareAddr,
			Ethernet: a.EncapType == "ether" && (kind == "device" || kind == "veth"),
			Carrier:  a.RawFlags&unix.IFF_LOWER_UP != 0 && a.RawFlags&unix.IFF_DORMANT == 0,
			Flaps:    flaps[a.Index],
		}
		out = append(out, k)
	}
	if !slices.ContainsFunc(out, func(k Link) bool { return k.Ethernet }) {
		return out, nil // as inside: there is nothing to ask about
	}
	return out, n.do(func() error { return describe(out) })
}

// flaps returns the carrier changes of every link by its index.
func (n *Namespace) flaps() (out map[int]uint32, err error) {
	err = n.do(func() (err error) {
		out, err = carrierChanges(unix.NLM_F_DUMP, 0)
		return err
	})
	return out, err
}

// Flaps returns how often the carrier of a link of the calling namespace has
// come or gone. See Link.
func Flaps(index int) (uint32, error) {
	all, err := carrierChanges(0, index)
	if err != nil {
		return 0, fmt.Errorf("carrier changes of link %d: %w", index, err)
	}
	flaps, ok := all[index]
	if !ok {
		return 0, fmt.Errorf("carrier changes of link %d: the kernel does not say", index)
	}
	return flaps, nil
}

// carrierChanges asks the kernel; the netlink package does not read them.
func carrierChanges(flags, index int) (map[int]uint32, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, flags)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	messages, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, err
	}
	out := map[int]uint32{}
	for _, m := range messages {
		attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
		if err != nil {
			return nil, err
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.IFLA_CARRIER_CHANGES && len(a.Value) == 4 {
				out[int(nl.DeserializeIfInfomsg(m).Index)] = binary.NativeEndian.Uint32(a.Value)
			}
		}
	}
	return out, nil
}

// Watch returns a channel that holds a value whenever a link, address or route
// has changed since it was last received from. Many changes may be one value.
// The channel is closed once ctx is done or the kernel's messages are lost.
func (n *Namespace) Watch(ctx context.Context) (<-chan struct{}, error) {
	ctx, cancel := context.WithCancel(ctx)
	links, addrs, routes := make(chan netlink.LinkUpdate, 16), make(chan netlink.AddrUpdate, 16), make(chan netlink.RouteUpdate, 16)
	lost := func(error) { cancel() }
	err := netlink.LinkSubscribeWithOptions(links, ctx.Done(), netlink.LinkSubscribeOptions{Namespace: &n.fd, ErrorCallback: lost})
	if err == nil {
		err = netlink.AddrSubscribeWithOptions(addrs, ctx.Done(), netlink.AddrSubscribeOptions{Namespace: &n.fd, ErrorCallback: lost})
	}
	if err == nil {
		err = netlink.RouteSubscribeWithOptions(routes, ctx.Done(), netlink.RouteSubscribeOptions{Namespace: &n.fd, ErrorCallback: lost})
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("network namespace %s: watch: %w", n.path, err)
	}
	out := make(chan struct{}, 1)
	changed := func() {
		select {
		case out <- struct{}{}:
		default:
		}
	}
	var all sync.WaitGroup
	all.Go(func() { forward(links, changed) })
	all.Go(func() { forward(addrs, changed) })
	all.Go(func() { forward(routes, changed) })
	go func() {
		<-ctx.Done()
		all.Wait()
		cancel()
		close(out)
	}()
	return out, nil
}

// forward drains in, which netlink closes, and reports each value.
func forward[T any](in <-chan T, changed func()) {
	for range in {
		changed()
	}
}
