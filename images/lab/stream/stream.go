// Package stream sends a known number of bytes one way over any connection and
// lets the receiver time them: the lab's benchmarks. A stream is a header of 8
// bytes (count, big-endian), then the bytes; the receiver answers with one line
// of JSON, a Result.
package stream

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"sekisho/guestlink"
)

const (
	// MaxBytes bounds one stream.
	MaxBytes = 4 << 30
	// Idle is how long either end waits for the other.
	Idle = 20 * time.Second

	block      = 64 << 10 // bytes of a write, as much as a vsock packet holds
	packetSize = 1400     // bytes of payload of a frame
)

// Result is a stream as its receiver saw it.
type Result struct {
	Bytes   int64 `json:"bytes"`       // of payload
	Elapsed int64 `json:"nanoseconds"` // from the header to the last byte
}

// Mbps is the rate of r in Mbit/s.
func (r Result) Mbps() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(r.Bytes) * 8 / (float64(r.Elapsed) / 1e3)
}

// Send sends count bytes and returns what the receiver saw. With frames, they
// are the payload of guestlink packet frames, many to a write.
func Send(conn net.Conn, count int64, frames bool) (Result, error) {
	if count <= 0 || count > MaxBytes {
		return Result{}, fmt.Errorf("stream: %d bytes, want 1 to %d", count, int64(MaxBytes))
	}
	buf, per, err := sendBuffer(frames)
	if err != nil {
		return Result{}, err
	}
	count = (count + per - 1) / per * per
	if err := write(conn, binary.BigEndian.AppendUint64(nil, uint64(count))); err != nil {
		return Result{}, err
	}
	for left := count; left > 0; left -= per {
		if err := write(conn, buf); err != nil {
			return Result{}, err
		}
	}
	if err := conn.SetReadDeadline(time.Now().Add(Idle)); err != nil {
		return Result{}, fmt.Errorf("stream: %w", err)
	}
	var r Result
	if err := json.NewDecoder(io.LimitReader(conn, 4<<10)).Decode(&r); err != nil {
		return r, fmt.Errorf("stream: answer of the receiver: %w", err)
	}
	return r, nil
}

// sendBuffer returns what one write carries, and how much payload that is.
func sendBuffer(frames bool) (buf []byte, payload int64, err error) {
	if !frames {
		return make([]byte, block), block, nil
	}
	packet := make([]byte, packetSize)
	for {
		next, err := guestlink.AppendFrame(buf, guestlink.TypePacket, packet)
		if err != nil {
			return nil, 0, fmt.Errorf("stream: %w", err)
		}
		if len(next) > guestlink.MaxBatch {
			return buf, payload, nil
		}
		buf, payload = next, payload+packetSize
	}
}

func write(conn net.Conn, b []byte) error {
	if err := conn.SetWriteDeadline(time.Now().Add(Idle)); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	if _, err := conn.Write(b); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return nil
}

// patient gives each read a deadline of its own.
type patient struct{ net.Conn }

func (p patient) Read(b []byte) (int, error) {
	if err := p.SetReadDeadline(time.Now().Add(Idle)); err != nil {
		return 0, err
	}
	return p.Conn.Read(b)
}

// Receive takes one stream and answers it.
func Receive(conn net.Conn, frames bool) (Result, error) {
	var header [8]byte
	in := io.Reader(patient{conn})
	if _, err := io.ReadFull(in, header[:]); err != nil {
		return Result{}, fmt.Errorf("stream: header: %w", err)
	}
	start := time.Now()
	count := binary.BigEndian.Uint64(header[:])
	if count == 0 || count > 2*MaxBytes {
		return Result{}, fmt.Errorf("stream: %d bytes announced, want 1 to %d", count, int64(MaxBytes))
	}
	r := Result{Bytes: int64(count)}
	if err := drain(in, int64(count), frames); err != nil {
		return Result{}, err
	}
	r.Elapsed = time.Since(start).Nanoseconds()
	line, err := json.Marshal(r)
	if err != nil {
		return r, fmt.Errorf("stream: %w", err)
	}
	return r, write(conn, append(line, '\n'))
}

func drain(in io.Reader, count int64, frames bool) error {
	if !frames {
		buf := make([]byte, block)
		for count > 0 {
			n, err := in.Read(buf[:min(count, block)])
			if count -= int64(n); err != nil && count > 0 {
				return fmt.Errorf("stream: %d bytes before the end: %w", count, err)
			}
		}
		return nil
	}
	reader := guestlink.NewReader(in)
	for count > 0 {
		f, err := reader.Next()
		if err != nil {
			return fmt.Errorf("stream: %d bytes before the end: %w", count, err)
		}
		count -= int64(len(f.Payload))
	}
	return nil
}

// Serve receives streams from one connection after another until l is closed,
// and reports each to seen.
func Serve(l net.Listener, frames bool, seen func(Result, error)) error {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("stream: %w", err)
		}
		r, err := Receive(conn, frames)
		seen(r, errors.Join(err, conn.Close()))
	}
}

// ParseResult reads the Result that a command printed as JSON.
func ParseResult(out []byte) (Result, error) {
	var r Result
	if err := json.Unmarshal(out, &r); err != nil || r.Bytes <= 0 {
		return r, fmt.Errorf("stream: no result in %.200q", out)
	}
	return r, nil
}
