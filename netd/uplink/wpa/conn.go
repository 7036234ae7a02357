//go:build linux

// Package wpa joins links to networks by Debian's wpa_supplicant: Wi-Fi (WPA2-
// and WPA3-Personal, EAP-TLS, open) and wired 802.1X. It speaks the program's
// control interface, datagrams of text over unix sockets (wpa_supplicant's
// documentation, "Control interface"), and never starts it: init does, as a
// user of its own.
package wpa

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// maxMessage bounds a datagram in bytes; scan results come in one of them
	// (wpa_supplicant answers with at most 4096 bytes for most, 32 KiB for BSS lists).
	maxMessage = 64 << 10
	// answerTime is how long a command may take.
	answerTime = 5 * time.Second
	// pendingEvents bounds the events kept for a slow reader; more are dropped.
	pendingEvents = 64
)

// ErrRefused is returned for a command that wpa_supplicant answered with FAIL
// or UNKNOWN COMMAND.
var ErrRefused = errors.New("wpa_supplicant refused")

// Conn is a connection to one control socket. Make one with Dial; Close it.
type Conn struct {
	conn   *net.UnixConn
	mu     sync.Mutex // one command at a time
	answer chan string
	events chan Event
	done   chan struct{}
}

// Dial connects to a control socket. Our own end has an abstract address, which
// takes no file that wpa_supplicant's user could not reach; the kernel lets
// nobody but the other end send to it, because it is connected.
func Dial(path string) (*Conn, error) {
	if st, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("wpa_supplicant: %w", err)
	} else if st.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("wpa_supplicant: %s is not a socket", path)
	}
	local := &net.UnixAddr{Net: "unixgram", Name: "@sekisho-wpa-" + rand.Text()}
	c, err := net.DialUnix("unixgram", local, &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		return nil, fmt.Errorf("wpa_supplicant: %w", err)
	}
	w := &Conn{conn: c, answer: make(chan string, 1), events: make(chan Event, pendingEvents), done: make(chan struct{})}
	go w.read()
	return w, nil
}

// Close ends the connection; Events is closed after it.
func (c *Conn) Close() {
	c.conn.Close()
	<-c.done
}

// Events are wpa_supplicant's, after Attach. It is closed with the connection.
func (c *Conn) Events() <-chan Event { return c.events }

// read sorts what arrives into events and answers.
func (c *Conn) read() {
	defer close(c.done)
	defer close(c.events)
	buf := make([]byte, maxMessage)
	for {
		n, err := c.conn.Read(buf)
		if err != nil {
			return // closed, or wpa_supplicant has gone: commands time out
		}
		text := string(buf[:n])
		if e, ok := ParseEvent(text); ok {
			select {
			case c.events <- e:
			default:
			}
			continue
		}
		select {
		case <-c.answer: // of a command that nobody waits for any more
		default:
		}
		c.answer <- text
	}
}

// Request sends a command and returns the answer without its last line feed.
// The command may hold a secret: no error repeats more than its first word.
func (c *Conn) Request(ctx context.Context, words ...string) (string, error) {
	command := strings.Join(words, " ")
	verb, _, _ := strings.Cut(command, " ")
	verb, _, _ = strings.Cut(verb, "\t")
	if strings.ContainsAny(command, "\n\x00") {
		return "", fmt.Errorf("wpa_supplicant: %s: line feed in a command", verb)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.answer:
	default:
	}
	// A program that hangs reads nothing, and a datagram waits for room.
	c.conn.SetWriteDeadline(time.Now().Add(answerTime))
	defer context.AfterFunc(ctx, func() { c.conn.SetWriteDeadline(time.Unix(1, 0)) })()
	if _, err := c.conn.Write([]byte(command)); err != nil {
		return "", fmt.Errorf("wpa_supplicant: %s: %w", verb, err)
	}
	timer := time.NewTimer(answerTime)
	defer timer.Stop()
	select {
	case a := <-c.answer:
		a = strings.TrimSuffix(a, "\n")
		if strings.HasPrefix(a, "FAIL") || a == "UNKNOWN COMMAND" {
			return "", fmt.Errorf("%w: %s: %.80s", ErrRefused, verb, a)
		}
		return a, nil
	case <-c.done:
		return "", fmt.Errorf("wpa_supplicant: %s: %w", verb, net.ErrClosed)
	case <-ctx.Done():
		return "", ctx.Err()
	case <-timer.C:
		return "", fmt.Errorf("wpa_supplicant: %s: no answer in %v", verb, answerTime)
	}
}

// Attach asks for events.
func (c *Conn) Attach(ctx context.Context) error {
	_, err := c.Request(ctx, "ATTACH")
	return err
}
