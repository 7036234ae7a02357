//go:build linux

package uplink

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"sekisho/netd/uplink/ndp"
)

const (
	// perSecond is how many of a link's messages are looked at in a second; a
	// flood beyond it stays in the kernel's buffer, which drops it.
	perSecond = 100
	// procIPv6 is there if the kernel has IPv6.
	procIPv6 = "/proc/sys/net/ipv6"
)

// client6 finds an IPv6 address on a link. The kernel takes no part in it: its
// IPv6 is off on the link until the plan has the address.
type client6 struct{ secret ndp.Secret }

// keep reports what l has of IPv6, at every change, until ctx is done. doubt says
// that nothing comes back over it.
func (c client6) keep(ctx context.Context, l Link, doubt <-chan struct{}, report func(Six)) {
	if _, err := os.Stat(procIPv6); err != nil || len(l.Hardware) != 6 {
		return
	}
	for ctx.Err() == nil {
		err := c.run(ctx, l, doubt, report)
		if ctx.Err() == nil { // the link may be going
			report(Six{Detail: err.Error()})
			wait(ctx, maxPause)
		}
	}
}

func (c client6) run(ctx context.Context, l Link, doubt <-chan struct{}, report func(Six)) error {
	conn, err := listen6(l, neighbourFilter)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	messages, ended := make(chan ndp.Message), make(chan error, 1)
	go func() { ended <- hear(ctx, conn, l.Hardware, messages) }()
	defer func() { cancel(); conn.Close(); <-ended }()
	s := newSlaac(c.secret, l.Hardware)
	grants := make(chan grant)
	dhcp := func() {} // ends it
	defer func() { dhcp() }()
	asking := false
	var last Six
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		send, next := s.step(now)
		for _, p := range send {
			to := ndp.Destination(p)
			if _, err := conn.WriteTo(p, &packet.Addr{HardwareAddr: ndp.Hardware(to)}); err != nil {
				return fmt.Errorf("IPv6 on %s: %w", l.Name, err)
			}
		}
		if six := s.six(now); six != last {
			last = six
			report(six)
		}
		if managed := s.managed(now) && s.local.address.IsValid() && past(s.local.ready, now); managed != asking {
			if asking = managed; asking {
				dhcp = c.start(ctx, l, s.local.address, grants)
			} else {
				dhcp()
				dhcp = func() {}
			}
		}
		timer.Reset(time.Until(next))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			ended <- err
			return fmt.Errorf("IPv6 on %s: %w", l.Name, err)
		case <-doubt:
			s.doubt(time.Now())
		case g := <-grants:
			s.granted(g)
		case m := <-messages:
			s.hear(m, time.Now())
		case <-timer.C:
		}
	}
}

// start runs DHCPv6, and returns what ends it.
func (c client6) start(ctx context.Context, l Link, local netip.Addr, grants chan<- grant) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.dhcp(ctx, l, local, func(g grant) {
			select {
			case grants <- g:
			case <-ctx.Done():
			}
		})
	}()
	return func() { cancel(); <-done }
}

// hear reads what neighbours say until ctx is done. What comes from the link's
// own hardware address has come back.
func hear(ctx context.Context, conn *packet.Conn, own net.HardwareAddr, out chan<- ndp.Message) error {
	b := make([]byte, 2048)
	second, n := time.Now(), 0
	for {
		if time.Since(second) >= time.Second {
			second, n = time.Now(), 0
		}
		if n++; n > perSecond {
			wait(ctx, time.Until(second.Add(time.Second)))
		}
		size, from, err := conn.ReadFrom(b)
		if err != nil {
			return err
		}
		if a, ok := from.(*packet.Addr); !ok || string(a.HardwareAddr) == string(own) {
			continue
		}
		m, err := ndp.Parse(b[:size])
		if err != nil {
			continue
		}
		select {
		case out <- m:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// listen6 opens a packet socket for those of a link's IPv6 packets that a filter
// lets pass, sent to whatever multicast address: it stands before the inet hooks.
func listen6(l Link, filter []bpf.Instruction) (*packet.Conn, error) {
	raw, err := bpf.Assemble(filter)
	if err != nil {
		return nil, err
	}
	conn, err := packet.Listen(&net.Interface{Index: l.Index, Name: l.Name, HardwareAddr: l.Hardware}, packet.Datagram, unix.ETH_P_IPV6, &packet.Config{Filter: raw})
	if err != nil {
		return nil, fmt.Errorf("IPv6 on %s: %w", l.Name, err)
	}
	sc, err := conn.SyscallConn()
	if err == nil {
		var serr error
		err = sc.Control(func(fd uintptr) {
			serr = unix.SetsockoptPacketMreq(int(fd), unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &unix.PacketMreq{Ifindex: int32(l.Index), Type: unix.PACKET_MR_ALLMULTI})
		})
		if err == nil {
			err = serr
		}
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("IPv6 on %s: %w", l.Name, err)
	}
	return conn, nil
}

// neighbourFilter lets pass what ndp.Parse may take: ICMPv6 without extension
// headers, hop limit 255, types 134 to 136 (offsets in the IPv6 header, RFC 8200,
// section 3).
var neighbourFilter = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 6, Size: 1}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 58, SkipTrue: 6},
	bpf.LoadAbsolute{Off: 7, Size: 1}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 255, SkipTrue: 4},
	bpf.LoadAbsolute{Off: 40, Size: 1}, bpf.JumpIf{Cond: bpf.JumpLessThan, Val: 134, SkipTrue: 2},
	bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: 136, SkipTrue: 1},
	bpf.RetConstant{Val: 2048},
	bpf.RetConstant{Val: 0},
}
