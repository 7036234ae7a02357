//go:build lab

// labhook is the lab's way into the host domain. It exists in lab images only.
//
// Synopsis:
//
//	labhook
//	labhook sink [-frames] PORT
//	labhook air up|down 1|2
//	labhook tunnel INNER ADDRESS:PORT BYTES
//	labhook link INNER ADDRESS:PORT [STREAMS]
//	labhook send SOCKET < BYTES
//
// Description:
//
//	Serves requests of the lab (package images/lab/hook) on the virtio serial
//	port org.sekisho.lab: commands and questions to the daemons of the host
//	domain, and, over vsock, of the stand-in work domain. It ends with status 0
//	on SIGTERM, 1 when the port cannot be used. sink, tunnel and link are the
//	host domain's ends of the benchmarks: sink receives streams on a vsock port,
//	tunnel sends one through the tunnel without the guest link, link receives one
//	through the guest link without the tunnel. air is a simulated access
//	point. send writes to a unix socket: a picture on the fingerprint reader.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"sekisho/guestlink"
	"sekisho/guestlink/vsock"
	"sekisho/images/lab/hook"
)

func main() {
	flag.Usage = func() {
		fmt.Fprintf(os.Stderr, "usage: labhook\nserves the lab's requests on %s; lab images only\n", hook.PortFile)
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	do := run
	if args := flag.Args(); len(args) > 1 && args[0] == "sink" {
		do = func(ctx context.Context) error { return sink(ctx, args[1:]) }
	} else if len(args) > 1 && args[0] == "air" {
		do = func(ctx context.Context) error { return air(ctx, args[1:]) }
	} else if len(args) > 1 && args[0] == "tunnel" {
		do = func(ctx context.Context) error { return tunnel(ctx, args[1:]) }
	} else if len(args) > 1 && args[0] == "link" {
		do = func(ctx context.Context) error { return link(ctx, args[1:]) }
	} else if len(args) == 2 && args[0] == "send" {
		do = func(ctx context.Context) error { return send(ctx, args[1]) }
	}
	if err := do(ctx); err != nil && ctx.Err() == nil {
		slog.Error("labhook", "err", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	port, err := hook.OpenPort(ctx, hook.PortFile)
	if err != nil {
		return err
	}
	defer port.Close()
	return hook.Serve(ctx, port, func(ctx context.Context, r hook.Request) hook.Response {
		if r.Target == hook.Host {
			return hook.Local(ctx, r)
		}
		a, err := forward(ctx, r)
		if err != nil {
			a.Error = err.Error()
		}
		return a
	})
}

// send writes standard input to a unix socket.
func send(ctx context.Context, socket string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	_, err = io.Copy(c, os.Stdin)
	return errors.Join(err, c.Close())
}

// forward passes r to labguest in the work domain.
func forward(ctx context.Context, r hook.Request) (hook.Response, error) {
	conn, err := vsock.Dial(ctx, guestlink.WorkCID, hook.GuestPort)
	if err != nil {
		return hook.Response{}, fmt.Errorf("labguest: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return hook.Call(conn, r)
}
