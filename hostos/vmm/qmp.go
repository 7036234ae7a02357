package vmm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// The client below is our own because what exists for Go brings libvirt's RPC
// code along and has neither a cap on what it reads nor contexts. QEMU runs
// next to the work domain and is not trusted: the protocol is JSON lines
// (docs/interop/qmp-spec.rst in QEMU), each of bounded length.
const (
	maxQMPLine = 64 << 10 // bytes
	qmpTimeout = 5 * time.Second
)

// event is one asynchronous message.
type event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// qmpMessage is any line that QEMU sends.
type qmpMessage struct {
	event
	QMP    json.RawMessage `json:"QMP"` // greeting
	ID     uint64          `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// qmp is one control connection.
type qmp struct {
	conn   net.Conn
	lines  *bufio.Scanner
	events func(event)

	mu      sync.Mutex
	id      uint64
	pending map[uint64]func(qmpMessage)
	err     error // set when reading has ended
	done    chan struct{}
}

// dialQMP connects, negotiates, and calls events from one goroutine until the
// connection ends. The caller closes it and then waits for done.
func dialQMP(ctx context.Context, path string, events func(event)) (*qmp, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("qmp: %w", err)
	}
	q := &qmp{conn: conn, lines: bufio.NewScanner(conn), events: events,
		pending: make(map[uint64]func(qmpMessage)), done: make(chan struct{})}
	q.lines.Buffer(make([]byte, 0, 4<<10), maxQMPLine)
	conn.SetReadDeadline(time.Now().Add(qmpTimeout))
	greeting, err := q.next()
	if err == nil && greeting.QMP == nil {
		err = errors.New("first line is not a greeting")
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("qmp: %w", err)
	}
	conn.SetReadDeadline(time.Time{})
	go q.read()
	if err := q.execute(ctx, "qmp_capabilities", nil); err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) next() (qmpMessage, error) {
	var m qmpMessage
	if !q.lines.Scan() {
		if err := q.lines.Err(); err != nil {
			return m, err
		}
		return m, io.EOF
	}
	return m, json.Unmarshal(q.lines.Bytes(), &m)
}

func (q *qmp) read() {
	defer close(q.done)
	for {
		m, err := q.next()
		if err != nil {
			q.mu.Lock()
			q.err = err
			q.mu.Unlock()
			q.conn.Close()
			return
		}
		if m.Name != "" {
			q.events(m.event)
			continue
		}
		q.mu.Lock()
		answered := q.pending[m.ID]
		delete(q.pending, m.ID)
		q.mu.Unlock()
		if answered != nil {
			answered(m)
		}
	}
}

// execute runs one command without arguments. Result, which may be nil, is
// called with what the command returns before any later event is handled.
func (q *qmp) execute(ctx context.Context, command string, result func(json.RawMessage) error) error {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	ch := make(chan error, 1)
	q.mu.Lock()
	q.id++
	id := q.id
	q.pending[id] = func(m qmpMessage) {
		switch {
		case m.Error != nil:
			ch <- fmt.Errorf("%s: %.200q", m.Error.Class, m.Error.Desc)
		case result != nil:
			ch <- result(m.Return)
		default:
			ch <- nil
		}
	}
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		delete(q.pending, id)
		q.mu.Unlock()
	}()
	line, err := json.Marshal(struct {
		Execute string `json:"execute"`
		ID      uint64 `json:"id"`
	}{command, id})
	if err != nil {
		return fmt.Errorf("qmp: %s: %w", command, err)
	}
	q.conn.SetWriteDeadline(time.Now().Add(qmpTimeout))
	if _, err := q.conn.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("qmp: %s: %w", command, err)
	}
	select {
	case err := <-ch:
		if err != nil {
			return fmt.Errorf("qmp: %s: %w", command, err)
		}
		return nil
	case <-q.done:
		q.mu.Lock()
		defer q.mu.Unlock()
		return fmt.Errorf("qmp: %s: %w", command, q.err)
	case <-ctx.Done():
		return fmt.Errorf("qmp: %s: %w", command, ctx.Err())
	}
}

// close ends the connection and waits for its reader.
func (q *qmp) close() {
	q.conn.Close()
	<-q.done
}
