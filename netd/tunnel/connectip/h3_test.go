package connectip

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/netd/tunnel"
)

// recorder is a requestStream that records what goes where.
type recorder struct {
	requestStream
	datagrams [][]byte
	stream    bytes.Buffer
}

func (r *recorder) SetWriteDeadline(time.Time) error { return nil }
func (r *recorder) Context() context.Context         { return context.Background() }
func (r *recorder) Write(b []byte) (int, error)      { return r.stream.Write(b) }
func (r *recorder) SendDatagram(b []byte) error {
	r.datagrams = append(r.datagrams, bytes.Clone(b))
	return nil
}

// packets returns the packets on the stream, and how many trains.
func (r *recorder) packets(t *testing.T) (packets [][]byte, trains int) {
	t.Helper()
	s := newScanner(new(sync.Pool), nil)
	for r.stream.Len() > 0 {
		n := copy(s.free(), r.stream.Next(scanSize/2))
		s.fed(n)
		for {
			kind, v, ok, err := s.next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			switch kind {
			case capsuleDatagram:
				packets = append(packets, bytes.Clone(v[1:]))
			case capsuleTrain:
				trains++
			}
		}
	}
	return packets, trains
}

// TestWhatGoesWhere: a burst is more than quic-go's queue holds, and none of it
// is lost: what goes as datagrams keeps below the queue, the rest goes on the
// stream, in order. A peer that is not ours gets datagrams only.
func TestWhatGoesWhere(t *testing.T) {
	packet := func(protocol byte, n, size int) []byte {
		p := make([]byte, size)
		p[0], p[9], p[19] = 0x45, protocol, byte(n)
		return p
	}
	const tcp, udp = 6, 17
	for _, c := range []struct {
		name              string
		ours              bool
		protocol          byte
		count, size       int
		train             bool
		datagrams, stream int
	}{
		{"a few", true, udp, 5, 100, false, 5, 0},
		{"a burst", true, udp, 200, 100, false, burst, 200 - burst},
		{"a little TCP", true, tcp, 5, 100, false, 5, 0},
		{"much TCP", true, tcp, 20, 1400, false, 0, 20},
		{"calls beside a train", true, udp, 5, 100, true, 5, 0},
		{"another's peer", false, udp, 200, 100, false, 200, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out []byte
			var want [][]byte
			for n := range c.count {
				p := packet(c.protocol, n, c.size)
				want = append(want, p)
				out = appendPacket(out, p)
			}
			if c.train {
				out = appendCapsule(out, capsuleTrain, make([]byte, tunnel.FrameHeader+60000))
			}
			var r recorder
			h := &overH3{stream: &r, ours: c.ours, moved: func() {}}
			if lost, err := h.send(out, queueFirst); lost != 0 || err != nil {
				t.Fatal(lost, err)
			}
			onStream, trains := r.packets(t)
			if len(r.datagrams) < c.datagrams || len(r.datagrams)+len(onStream) != c.count || c.stream > 0 && len(onStream) == 0 || (trains == 1) != c.train {
				t.Errorf("%d datagrams, %d packets and %d trains on the stream; want %d and %d", len(r.datagrams), len(onStream), trains, c.datagrams, c.stream)
			}
			for i, d := range r.datagrams {
				onStream = append(onStream[:i], append([][]byte{d[1:]}, onStream[i:]...)...)
			}
			if c.protocol == udp { // datagrams first, then the stream: the order they came in
				for i := range want {
					if !bytes.Equal(onStream[i], want[i]) {
						t.Fatalf("packet %d is another", i)
					}
				}
			}
		})
	}
	var h overH3
	n := 0
	for h.mayDatagram() {
		n++
	}
	if n < burst || n > 2*burst {
		t.Errorf("%d datagrams at once, want about %d", n, burst)
	}
}

// TestUDPAway: a packet that no network takes is lost, and QUIC lives.
func TestUDPAway(t *testing.T) {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := UDP(c).(udpSocket)
	away := &net.UDPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 443} // not to be reached from the loopback address
	if n, _, err := s.WriteMsgUDP([]byte("x"), nil, away); n != 1 || err != nil {
		t.Errorf("lost packet: %d, %v", n, err)
	}
	oob := make([]byte, unix.CmsgSpace(2))
	oob[0], oob[8], oob[12], oob[16] = byte(unix.CmsgLen(2)), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 200
	if !segmented(oob) || segmented(nil) {
		t.Error("segmentation not seen")
	}
	if _, _, err := s.WriteMsgUDP([]byte("x"), oob, away); !errors.Is(err, syscall.EIO) {
		t.Errorf("segments that do not fit: %v, want EIO", err)
	}
	c.Close()
	if _, _, err := s.WriteMsgUDP([]byte("x"), nil, away); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}
