package login

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sekisho/attest/gate"
)

// Socket is where logind is asked.
const Socket = "/run/sekisho/logind.sock"

// CardSocket is the name of the socket for QEMU in logind's directory.
const CardSocket = "card.sock"

// ErrUsage is a wrong command line.
var ErrUsage = errors.New("wrong command line; see logind -h")

// ListenCard opens the socket for QEMU in dir.
func ListenCard(dir string) (net.Listener, error) {
	path := filepath.Join(dir, CardSocket)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("card socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("card socket: %w", err)
	}
	// QEMU's user is another: the folder says who comes here, ServeCard who stays.
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(fmt.Errorf("card socket: %w", err), l.Close())
	}
	return l, nil
}

// NewWhenReady is New, tried again until attestd has its TPM and answers.
func NewWhenReady(ctx context.Context, c Config) (*Engine, error) {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for {
		e, err := New(ctx, c)
		if err == nil {
			return e, nil
		}
		c.Log.Warn("the logon state cannot be had yet", "error", err)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}

// KeepAlive tells the service manager that logind lives, until ctx ends.
func KeepAlive(ctx context.Context, notify func(string)) error {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			notify("WATCHDOG=1")
		}
	}
}

// Notify tells the service manager each change of status, until ctx ends.
func (e *Engine) Notify(ctx context.Context, notify func(string)) error {
	last := ""
	for {
		changed := e.Changed()
		if line := e.Status().Line(); line != last {
			last = line
			notify("STATUS=" + line)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// Ask is logind's command line but for run: one question to the daemon.
func Ask(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	c := Command{Do: args[0]}
	socket := f.String("socket", Socket, "logind's `socket`")
	asJSON := f.Bool("json", false, "print JSON")
	f.StringVar(&c.User, "user", "", "`account` at the organisation, such as taro@EXAMPLE.LG.JP")
	f.StringVar(&c.Name, "name", "", "`name` for people")
	f.StringVar(&c.Finger, "finger", "right-index-finger", "`finger`, by fprintd's names")
	f.IntVar(&c.Minutes, "minutes", 0, "for how many `minutes` the PIN may stand alone")
	if err := f.Parse(args[1:]); err != nil || f.NArg() > 0 {
		return ErrUsage
	}
	method, path, body := http.MethodPost, "/v1/admin", []byte(nil)
	switch c.Do {
	case "status":
		method, path = http.MethodGet, "/v1/status"
	case "import", "pin":
		data, err := io.ReadAll(io.LimitReader(in, maxBody))
		if err != nil {
			return err
		}
		if c.Do == "pin" {
			c.PIN = strings.TrimSpace(string(data))
		} else {
			c.Chain = string(data)
		}
	case "setup", "request", "enrol", "delete", "pin-only":
	default:
		return fmt.Errorf("%q: %w", c.Do, ErrUsage)
	}
	if method == http.MethodPost {
		var err error
		if body, err = json.Marshal(c); err != nil {
			return err
		}
	}
	answer, err := call(ctx, *socket, method, path, body)
	if err != nil || *asJSON {
		_, werr := out.Write(answer)
		return errors.Join(err, werr)
	}
	return show(c.Do, answer, out)
}

func call(ctx context.Context, socket, method, path string, body []byte) ([]byte, error) {
	var d net.Dialer
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialContext(ctx, "unix", socket)
	}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://logind"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("logind does not answer: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s", bytes.TrimSpace(answer))
	}
	return answer, nil
}

// show prints an answer for people.
func show(what string, answer []byte, out io.Writer) (err error) {
	switch what {
	case "status":
		var s Status
		if err := json.Unmarshal(answer, &s); err != nil {
			return err
		}
		_, err = fmt.Fprintf(out, "%s\ncard in the reader: %v\nfingerprint reader: %v, %d fingers\nPIN: %d tries left\n", s.Line(), s.Inserted, s.Reader, s.Fingers, s.PINLeft)
		for _, e := range s.Events {
			if err == nil {
				_, err = fmt.Fprintf(out, "%s %s %s %s %s\n", e.Time.Format(time.RFC3339), e.User, e.Slot, e.Factor, e.Reason)
			}
		}
	case "setup", "request":
		var r gate.CardRequest
		if err := json.Unmarshal(answer, &r); err != nil {
			return err
		}
		_, err = out.Write(r.CSR)
	default:
		var text string
		if err := json.Unmarshal(answer, &text); err != nil {
			return err
		}
		_, err = fmt.Fprintln(out, text)
	}
	return err
}
