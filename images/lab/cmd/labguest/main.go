//go:build lab

// labguest is the lab's way into the stand-in work domain. It exists in lab
// images only.
//
// Synopsis:
//
//	labguest serve
//	labguest get URL
//	labguest probe [-n COUNT] [-every D] TOKEN ADDRESS:PORT...
//	labguest dial [-wait D] PORT < BYTES
//
// Description:
//
//	serve  answers the lab's requests on vsock port 1099, from the host only
//	get    prints the body of URL; exit status 1 unless it was answered with 200
//	probe  sends COUNT numbered UDP packets to each address, and prints how many
//	       the kernel took; what is refused for want of a route counts as lost
//	dial   connects to a vsock PORT of the host domain, sends standard input, then
//	       reads until the end or for D; prints "refused", or what happened
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"

	"sekisho/guestlink"
	"sekisho/images/lab/hook"
)

// maxBody bounds the page that get prints, in bytes.
const maxBody = 1 << 20

func main() {
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: labguest serve | get URL | probe [-n COUNT] [-every D] TOKEN ADDRESS:PORT... | dial [-wait D] PORT\nthe lab's hand in the stand-in work domain; lab images only")
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	var err error
	switch args := flag.Args(); {
	case len(args) == 1 && args[0] == "serve":
		err = serve(ctx)
	case len(args) == 2 && args[0] == "get":
		err = get(ctx, args[1])
	case len(args) > 1 && args[0] == "probe":
		err = probe(ctx, args[1:])
	case len(args) > 1 && args[0] == "dial":
		err = dial(args[1:])
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
	l, err := vsock.Listen(hook.GuestPort, nil)
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
		if a, ok := conn.RemoteAddr().(*vsock.Addr); !ok || a.ContextID != guestlink.HostCID {
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			_ = hook.Serve(ctx, conn, hook.Local) // its end is the client's going away
		})
	}
}

func get(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	p, err := http.DefaultClient.Do(q)
	if err != nil {
		return err
	}
	defer p.Body.Close()
	if _, err := io.Copy(os.Stdout, io.LimitReader(p.Body, maxBody)); err != nil {
		return err
	}
	if p.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, p.Status)
	}
	return nil
}

func probe(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("probe", flag.ExitOnError)
	count := flags.Int("n", 100, "packets to each address")
	every := flags.Duration("every", 10*time.Millisecond, "time between two rounds")
	flags.Parse(args)
	if flags.NArg() < 2 {
		return errors.New("probe: want a token and at least one address")
	}
	conn, err := net.ListenUDP("udp4", nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	tick := time.NewTicker(*every)
	defer tick.Stop()
	sent := 0
	for i := range *count {
		for _, to := range flags.Args()[1:] {
			a, err := net.ResolveUDPAddr("udp4", to)
			if err != nil {
				return err
			}
			if _, err := conn.WriteToUDP(fmt.Appendf(nil, "%s %d", flags.Arg(0), i), a); err == nil {
				sent++
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	fmt.Println(sent)
	return nil
}

func dial(args []string) error {
	flags := flag.NewFlagSet("dial", flag.ExitOnError)
	wait := flags.Duration("wait", time.Second, "how long to read at the end")
	flags.Parse(args)
	port, err := strconv.ParseUint(flags.Arg(0), 10, 32)
	if err != nil {
		return fmt.Errorf("dial: port: %w", err)
	}
	conn, err := vsock.Dial(guestlink.HostCID, uint32(port), nil)
	if err != nil {
		fmt.Println("refused")
		return nil
	}
	defer conn.Close()
	sent, err := io.Copy(conn, os.Stdin)
	fmt.Printf("sent %d bytes, error %v\n", sent, err)
	if err := conn.SetReadDeadline(time.Now().Add(*wait)); err != nil {
		return err
	}
	received, err := io.Copy(io.Discard, conn)
	fmt.Printf("received %d bytes, error %v\n", received, err)
	return nil
}
