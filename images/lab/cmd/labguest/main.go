//go:build lab

// labguest is the lab's way into the stand-in work domain. It exists in lab
// images only.
//
// Synopsis:
//
//	labguest serve
//	labguest probe [-n COUNT] [-every D] [-o FILE] TOKEN ADDRESS:PORT...
//	labguest dial [-wait D] PORT < BYTES
//	labguest ports [-for D]
//	labguest stream [-frames] [-tcp ADDRESS:PORT | -vsock PORT] BYTES
//
// Description:
//
//	serve  answers the lab's requests on vsock port 1099, from the host only
//	probe  sends COUNT numbered UDP packets to each address, and prints how many
//	       the kernel took; SIGTERM ends it early
//	dial   connects to a vsock PORT of the host domain, sends standard input, then
//	       reads until the end or for D; prints "refused", or what happened
//	ports  connects to vsock ports of the host domain: the low ones, those around
//	       powers of two, and others at random for D; prints which answered
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"sekisho/guestlink"
	"sekisho/guestlink/vsock"
	"sekisho/images/lab/hook"
)

func main() {
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: labguest serve | probe [-n COUNT] [-every D] [-o FILE] TOKEN ADDRESS:PORT... | dial [-wait D] PORT | ports [-for D] | stream [-frames] [-tcp ADDRESS:PORT | -vsock PORT] BYTES\nthe lab's hand in the stand-in work domain; lab images only ("+hook.PortName+")")
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	var err error
	switch args := flag.Args(); {
	case len(args) == 1 && args[0] == "serve":
		err = serve(ctx)
	case len(args) > 1 && args[0] == "probe":
		err = probe(ctx, args[1:])
	case len(args) > 1 && args[0] == "dial":
		err = dial(ctx, args[1:])
	case len(args) > 0 && args[0] == "ports":
		err = ports(ctx, args[1:])
	case len(args) > 1 && args[0] == "stream":
		err = send(ctx, args[1:])
	default:
		flag.Usage()
		os.Exit(2)
	}
	if err != nil && ctx.Err() == nil {
		slog.Error("labguest", "err", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context) error {
	l, err := vsock.Listen(guestlink.WorkCID, hook.GuestPort, guestlink.HostCID)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			_ = hook.Serve(ctx, conn, hook.Local) // its end is the client's going away
		})
	}
}
