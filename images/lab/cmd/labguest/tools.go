//go:build lab

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"sekisho/guestlink"
	"sekisho/guestlink/vsock"
	"sekisho/images/lab/stream"
)

func probe(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("probe", flag.ExitOnError)
	count := flags.Int("n", 100, "packets to each address")
	out := flags.String("o", "/dev/stdout", "where the count goes at the end")
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
	for i := 0; i < *count && ctx.Err() == nil; i++ {
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
		}
	}
	return os.WriteFile(*out, fmt.Appendln(nil, sent), 0o644)
}

func dial(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("dial", flag.ExitOnError)
	wait := flags.Duration("wait", time.Second, "how long to read at the end")
	flags.Parse(args)
	port, err := strconv.ParseUint(flags.Arg(0), 10, 32)
	if err != nil {
		return fmt.Errorf("dial: port: %w", err)
	}
	conn, err := vsock.Dial(ctx, guestlink.HostCID, uint32(port))
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

func send(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("stream", flag.ExitOnError)
	frames := flags.Bool("frames", false, "send guestlink frames")
	tcp := flags.String("tcp", "", "`address` and port of a sink behind the tunnel")
	port := flags.Uint("vsock", 0, "vsock `port` of a sink in the host domain")
	flags.Parse(args)
	count, err := strconv.ParseInt(flags.Arg(0), 10, 64)
	if err != nil {
		return fmt.Errorf("stream: bytes: %w", err)
	}
	var conn net.Conn
	if *tcp != "" {
		conn, err = (&net.Dialer{Timeout: stream.Idle}).DialContext(ctx, "tcp4", *tcp)
	} else {
		conn, err = vsock.Dial(ctx, guestlink.HostCID, uint32(*port))
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	r, err := stream.Send(conn, count, *frames)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}
