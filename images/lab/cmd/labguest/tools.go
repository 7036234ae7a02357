//go:build lab

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
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

// ports looks for listeners.
func ports(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("ports", flag.ExitOnError)
	limit := flags.Duration("for", 10*time.Second, "how long")
	flags.Parse(args)
	list := []uint32{guestlink.PortPackets}
	for n := range 32 {
		list = append(list, 1<<n-1, 1<<n, 1<<n+1)
	}
	for port := range uint32(2048) {
		list = append(list, port)
	}
	tried, answered := map[uint32]bool{}, []uint32{}
	for end := time.Now().Add(*limit); time.Now().Before(end) && ctx.Err() == nil; {
		port := rand.Uint32()
		if len(list) > 0 {
			port, list = list[0], list[1:]
		}
		if tried[port] {
			continue
		}
		tried[port] = true
		if conn, err := vsock.Dial(ctx, guestlink.HostCID, port); err == nil {
			conn.Close()
			answered = append(answered, port)
		}
	}
	fmt.Printf("tried %d answered %s\n", len(tried), strings.Trim(fmt.Sprint(answered), "[]"))
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
