package hook

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// maxRunning bounds the requests of one stream that are carried out at a time.
const maxRunning = 8

// Handler carries out one request.
type Handler func(context.Context, Request) Response

// Serve carries out the requests that arrive on stream until it ends or ctx
// does; answers come in the order in which they are ready. It returns nil at
// the end of the stream, after the last answer.
func Serve(ctx context.Context, stream io.ReadWriter, handle Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	var mu sync.Mutex // one answer at a time
	slots := make(chan struct{}, maxRunning)
	in := bufio.NewReader(stream)
	for {
		line, err := readLine(in)
		switch {
		case errors.Is(err, errLong):
			continue
		case errors.Is(err, io.EOF):
			wg.Wait()
			return nil
		case err != nil:
			return fmt.Errorf("hook: %w", err)
		}
		var r Request
		if json.Unmarshal(line, &r) != nil || r.ID == "" {
			continue // what a client before left behind
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		wg.Go(func() {
			defer func() { <-slots }()
			a := Response{ID: r.ID}
			if err := r.Validate(); err != nil {
				a.Error = err.Error()
			} else {
				ctx, cancel := context.WithTimeout(ctx, r.Timeout)
				defer cancel()
				a = handle(ctx, r)
				a.ID = r.ID
			}
			mu.Lock()
			defer mu.Unlock()
			// A client that has gone is no reason to stop: the next may come
			// on the same stream.
			_ = writeLine(stream, a)
		})
	}
}

// Local carries out r on this machine.
func Local(ctx context.Context, r Request) Response {
	if r.Socket != "" {
		return ask(ctx, r)
	}
	if r.Detach {
		return detach(r)
	}
	return run(ctx, r)
}

// detach starts a command that outlives its request.
func detach(r Request) Response {
	c := exec.Command(r.Argv[0], r.Argv[1:]...)
	c.Stderr = os.Stderr // what it dies of goes where our own words go
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return Response{Error: err.Error()}
	}
	pid := c.Process.Pid
	go func() { _ = c.Wait() }() // no zombie; it ends when the command does
	return Response{Stdout: fmt.Appendln(nil, pid)}
}

func run(ctx context.Context, r Request) Response {
	var stdout, stderr capped
	c := exec.CommandContext(ctx, r.Argv[0], r.Argv[1:]...)
	c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(r.Stdin), &stdout, &stderr
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // children go with it
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = time.Second // a daemon it left behind may hold the pipes
	err := c.Run()
	a := Response{Stdout: stdout.b, Stderr: stderr.b, Cut: stdout.cut || stderr.cut}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		a.Error = fmt.Sprintf("%s: %v", r.Argv[0], ctx.Err())
	case errors.As(err, &exit):
		a.Exit = exit.ExitCode()
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		a.Error = err.Error()
	}
	return a
}

func ask(ctx context.Context, r Request) Response {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", r.Socket)
		},
	}}
	q, err := http.NewRequestWithContext(ctx, r.Method, "http://daemon"+r.Path, bytes.NewReader(r.Stdin))
	if err != nil {
		return Response{Error: err.Error()}
	}
	p, err := client.Do(q)
	if err != nil {
		return Response{Error: err.Error()}
	}
	defer p.Body.Close()
	var body capped
	if _, err := io.Copy(&body, p.Body); err != nil {
		return Response{Error: err.Error()}
	}
	return Response{Exit: p.StatusCode, Stdout: body.b, Cut: body.cut}
}

// capped keeps the first maxOutput bytes written to it.
type capped struct {
	b   []byte
	cut bool
}

func (c *capped) Write(p []byte) (int, error) {
	n := min(len(p), maxOutput-len(c.b))
	c.b = append(c.b, p[:n]...)
	c.cut = c.cut || n < len(p)
	return len(p), nil
}

// Port is an open virtio serial port. It has no peer while no client is
// connected: a read then ends at once, and is tried again.
type Port struct {
	ctx context.Context
	f   *os.File
}

// OpenPort opens the port of the lab, waiting until the kernel shows it.
func OpenPort(ctx context.Context, path string) (*Port, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err == nil {
			return &Port{ctx, f}, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("hook: %w", err)
		}
		if err := pause(ctx); err != nil {
			return nil, fmt.Errorf("hook: %s never came: %w", path, err)
		}
	}
}

// Read waits for bytes until the context ends.
func (p *Port) Read(b []byte) (int, error) {
	for {
		n, err := p.f.Read(b)
		if n > 0 || (err != nil && !errors.Is(err, io.EOF)) {
			return n, err
		}
		if err := pause(p.ctx); err != nil {
			return 0, err
		}
	}
}

func (p *Port) Write(b []byte) (int, error) { return p.f.Write(b) }

// Close closes the port.
func (p *Port) Close() error { return p.f.Close() }

// pause waits between two looks at something that the kernel does not announce.
func pause(ctx context.Context) error {
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
