// Package serial carries the guest link over one virtio-serial port, where the
// work domain has no vsock. Such a port is a stream that never begins: bytes of
// an earlier process may still be on the way when the next one opens it. Both
// ends therefore exchange sync records until each has seen the other answer
// its own; the link begins behind them.
package serial

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// PortName is the name of the port in QEMU's virtserialport device.
const PortName = "org.sekisho.link"

// A sync record is magic, the sender's session and the one that it answers, 0
// while it has seen none; both 64 bits, big endian.
const (
	magic      = "\xffsekisho sync 1\n"
	recordSize = len(magic) + 16
)

const (
	// again is the time between records while no answer comes.
	again = 500 * time.Millisecond
	// maxStale is how many bytes of an earlier session are skipped: more than
	// any buffer on the way holds.
	maxStale = 16 << 20
)

// errStale is a port that gives bytes without end and no record.
var errStale = errors.New("serial: no sync record in 16 MiB")

// Sync meets the other end and returns a connection that begins where its
// session does. It waits until the other end is there or ctx is done, and then
// closes conn. The guest at the other end can make it fail, nothing else.
func Sync(ctx context.Context, conn net.Conn) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c, err := synchronise(conn)
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("serial: meet the other end: %w", err)
	}
	return c, nil
}

func synchronise(conn net.Conn) (net.Conn, error) {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	own := binary.BigEndian.Uint64(b[:]) | 1
	in := bufio.NewReaderSize(conn, 4<<10)
	peer := uint64(0)
	var told, answered bool // peer has our answer on its way; peer has answered us
	for skipped := 0; ; {
		if !told {
			if err := conn.SetWriteDeadline(time.Now().Add(again)); err != nil {
				return nil, err
			}
			// A write that ends half way is an error: the caller begins anew.
			if _, err := conn.Write(record(own, peer)); err != nil {
				return nil, err
			}
			told = peer != 0
		}
		if told && answered {
			return &syncedConn{Conn: conn, in: in, peer: peer}, conn.SetDeadline(time.Time{})
		}
		if err := conn.SetReadDeadline(time.Now().Add(again)); err != nil {
			return nil, err
		}
		from, to, n, err := next(in)
		if skipped += n; skipped > maxStale {
			return nil, errStale
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			told = false // ask again
		case err != nil:
			return nil, err
		case from == own: // our own, sent back by a port in loopback
			return nil, errors.New("the port echoes")
		default:
			if from != peer {
				peer, told = from, false
			}
			answered = to == own
		}
	}
}

func record(own, peer uint64) []byte {
	b := binary.BigEndian.AppendUint64([]byte(magic), own)
	return binary.BigEndian.AppendUint64(b, peer)
}

// next skips to the next record and takes it, and not a byte more.
func next(in *bufio.Reader) (from, to uint64, skipped int, err error) {
	for {
		b, err := in.Peek(recordSize)
		if len(b) == recordSize && bytes.HasPrefix(b, []byte(magic)) {
			from, to = binary.BigEndian.Uint64(b[len(magic):]), binary.BigEndian.Uint64(b[len(magic)+8:])
			in.Discard(recordSize)
			return from, to, skipped, nil
		}
		// Skip what cannot begin a record: up to the next first byte of one.
		n := len(b)
		if i := bytes.IndexByte(b[min(1, len(b)):], magic[0]); i >= 0 {
			n = i + 1
		}
		if len(b) > 0 && bytes.HasPrefix([]byte(magic), b[:min(len(b), len(magic))]) {
			n = 0 // the beginning of one
		}
		in.Discard(n)
		skipped += n
		if err != nil {
			return 0, 0, skipped, err
		}
		if skipped > maxStale {
			return 0, 0, skipped, nil
		}
	}
}

// syncedConn reads on from where the sync ended.
type syncedConn struct {
	net.Conn
	in    *bufio.Reader
	peer  uint64
	begun bool
}

// Read skips records that the peer repeated before it had our answer; behind
// its first frame there are none.
func (c *syncedConn) Read(b []byte) (int, error) {
	for !c.begun {
		first, err := c.in.Peek(1)
		if err != nil {
			return 0, err
		}
		if first[0] != magic[0] {
			c.begun = true
			break
		}
		if _, err := c.in.Peek(recordSize); err != nil {
			return 0, err
		}
		if from, _, skipped, err := next(c.in); err != nil || skipped > 0 || from != c.peer {
			return 0, errRestarted
		}
	}
	return c.in.Read(b)
}

// errRestarted is another end that begins anew.
var errRestarted = errors.New("serial: the other end has begun a new session")

// Listener accepts QEMU's connections to the chardev socket of the port. Accept
// returns one when the guest has met us over it.
type Listener struct {
	ctx     context.Context
	cancel  context.CancelFunc
	l       net.Listener
	allow   func(net.Conn) bool
	refused func()
}

// NewListener returns a Listener on l for connections that allow accepts;
// others are closed and refused is called.
func NewListener(l net.Listener, allow func(net.Conn) bool, refused func()) *Listener {
	ctx, cancel := context.WithCancel(context.Background())
	return &Listener{ctx: ctx, cancel: cancel, l: l, allow: allow, refused: refused}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.l.Accept()
		if err != nil {
			return nil, err
		}
		if !l.allow(c) {
			l.refused()
			c.Close()
			continue
		}
		if s, err := Sync(l.ctx, c); err == nil {
			return s, nil
		}
	}
}

// Close implements net.Listener; it ends Accept.
func (l *Listener) Close() error {
	l.cancel()
	return l.l.Close()
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.l.Addr() }

// Dial opens the guest's end of the port and meets the host.
func Dial(ctx context.Context) (net.Conn, error) {
	f, err := open()
	if err != nil {
		return nil, fmt.Errorf("serial: open port %s: %w; does the work domain have this port?", PortName, err)
	}
	return Sync(ctx, &fileConn{f})
}

// fileConn makes a net.Conn of a file that knows deadlines.
type fileConn struct{ *os.File }

type addr struct{}

func (addr) Network() string { return "virtio-serial" }
func (addr) String() string  { return PortName }

func (fileConn) LocalAddr() net.Addr  { return addr{} }
func (fileConn) RemoteAddr() net.Addr { return addr{} }
