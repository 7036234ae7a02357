//go:build linux

// Command linkd is the host domain's end of the guest link: it creates the TUN
// device through which the work domain's packets come and go, and serves the
// one work domain over vsock.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"sekisho/guestlink"
	"sekisho/guestlink/host"
	"sekisho/guestlink/packet"
	"sekisho/guestlink/serial"
)

const usage = `linkd: the host domain's end of the guest link

It creates a TUN device in the network namespace it is started in and carries
packets between it and the work domain over vsock, port %d. Nothing is carried
until PUT /v1/config on the API socket has said which inner address the work
domain has. The API socket comes from the service manager (LISTEN_FDS); state
goes back to it (NOTIFY_SOCKET: "waiting", "linked cid 3").

The device stays when linkd ends, however it ends, and the next linkd takes it
over: connections through it live on. "ip link del work0" removes it.

  linkd -cid 3 -tun work0
  linkd -serial /run/sekisho/link.sock   the chardev socket of QEMU's port %s
  curl --unix-socket /run/sekisho/linkd.sock http://linkd/v1/status

It needs CAP_NET_ADMIN. Exit codes: 0 ended by a signal, 1 failed, 2 wrong usage.

`

func main() {
	cid := flag.Uint("cid", guestlink.WorkCID, "vsock context `id` of the one guest that is let in")
	tun := flag.String("tun", guestlink.WorkLink, "`name` of the TUN device to create")
	client := flag.String("client", "netd", "`user` who, beside root, may use the API socket")
	carry := flag.String("carry", "fragments", "unusual packets to carry: `list` of fragments, options, extensions, or empty")
	port := flag.String("serial", "", "listen at this unix `socket` for QEMU's virtio-serial port instead of vsock")
	vmm := flag.String("vmm", "vmm", "`user` whose QEMU may connect to that socket")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), usage, guestlink.PortPackets, serial.PortName)
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 || *cid <= guestlink.HostCID || *cid >= 1<<32-1 {
		flag.Usage()
		os.Exit(2)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	policy, err := guestlink.ParsePolicy(*carry)
	if err != nil {
		log.Error("flag -carry", "error", err)
		os.Exit(2)
	}
	o := options{cid: uint32(*cid), tun: *tun, client: *client, policy: policy, port: *port, vmm: *vmm}
	if err := o.run(ctx, log); err != nil && !errors.Is(err, context.Canceled) {
		log.Error("linkd ends", "error", err)
		os.Exit(1)
	}
}

type options struct {
	cid               uint32
	tun, client, port string
	vmm               string
	policy            guestlink.Policy
}

func (o options) run(ctx context.Context, log *slog.Logger) error {
	apis, err := activation.Listeners()
	if err != nil {
		return fmt.Errorf("api socket: %w", err)
	}
	if slices.Contains(apis, nil) { // a descriptor that is no listening socket
		return fmt.Errorf("api socket: LISTEN_FDS passes %d descriptors, and one of them does not listen", len(apis))
	}
	dev, err := packet.OpenTUN(o.tun)
	if err != nil {
		return err
	}
	if err := errors.Join(packet.Keep(dev), packet.LinkUp(o.tun)); err != nil {
		return err
	}
	links, refused, err := o.listen(log)
	if err != nil {
		return err
	}
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("notify", "error", err)
		}
	}
	s := host.New(dev, o.cid, o.policy, users(log, o.client), refused,
		func(status string) { notify("STATUS=" + status) }, time.Now, log)
	s.Serial = o.port != ""
	notify(daemon.SdNotifyReady)
	go watchdog(ctx, s.Alive, notify)
	return s.Run(ctx, links, apis...)
}
