package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"
)

// Statistics say what a recording holds.
type Statistics struct {
	Frames  int `json:"frames"`
	Dropped int `json:"dropped"` // frames that the kernel had no room for
}

// receiveBuffer is the room for frames that wait to be written, in bytes.
const receiveBuffer = 64 << 20

// Recorder holds an open packet socket (packet(7)) on one interface; frames
// wait in it from Open on.
type Recorder struct{ fd int }

// Open begins to collect the frames of the named interface of the current
// network namespace, in both directions. It needs CAP_NET_RAW.
func Open(name string) (*Recorder, error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("capture: interface %q: %w", name, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // protocol 0: nothing before bind
	if err != nil {
		return nil, fmt.Errorf("capture: packet socket: %w", err)
	}
	fail := func(what string, err error) (*Recorder, error) {
		unix.Close(fd)
		return nil, fmt.Errorf("capture: %s on %q: %w", what, name, err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer); err != nil {
		return fail("receive buffer", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return fail("receive timeout", err)
	}
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}); err != nil {
		return fail("bind", err)
	}
	return &Recorder{fd: fd}, nil
}

// Record writes frames to w as a pcap file until ctx ends. Each frame reaches w
// in one Write, soon after it was seen, so that a file can be judged while it
// grows. The interface going away is not an error: another may not come under
// the same index, so Record then only waits for ctx.
func (r *Recorder) Record(ctx context.Context, w io.Writer) (Statistics, error) {
	var stats Statistics
	out := &whole{w: w}
	p := pcapgo.NewWriterNanos(out)
	if err := errors.Join(p.WriteFileHeader(maxFrame, layers.LinkTypeEthernet), out.flush()); err != nil {
		return stats, fmt.Errorf("capture: %w", err)
	}
	buf := make([]byte, maxFrame)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(r.fd, buf, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENETDOWN), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
			continue
		case err != nil:
			return stats, fmt.Errorf("capture: receive: %w", err)
		}
		stats.Frames++
		info := gopacket.CaptureInfo{Timestamp: time.Now(), CaptureLength: min(n, len(buf)), Length: n}
		if err := errors.Join(p.WritePacket(info, buf[:info.CaptureLength]), out.flush()); err != nil {
			return stats, fmt.Errorf("capture: %w", err)
		}
	}
	if s, err := unix.GetsockoptTpacketStats(r.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
		stats.Dropped = int(s.Drops)
	}
	return stats, nil
}

// Close ends the collection.
func (r *Recorder) Close() error { return unix.Close(r.fd) }

// whole gathers the small writes of one record into one.
type whole struct {
	w   io.Writer
	buf []byte
}

func (o *whole) Write(p []byte) (int, error) {
	o.buf = append(o.buf, p...)
	return len(p), nil
}

func (o *whole) flush() error {
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}
