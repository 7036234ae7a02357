package packet

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"sync"
)

// EtherTypes (IANA, IEEE 802 numbers) and lengths.
const (
	etherIPv4, etherARP, etherIPv6 = 0x0800, 0x0806, 0x86dd

	etherHeader = 14
	arpLength   = 28
)

// peerMAC is the address of the one neighbour that a TAP device sees: locally
// administered, unicast.
var peerMAC = [6]byte{0x02, 0x73, 0x65, 0x6b, 0x69, 0x01}

// etherDevice makes a TUN device of a TAP device. It takes the Ethernet headers
// off, is the neighbour of every address (ARP, RFC 826; neighbour discovery,
// RFC 4861) and drops all that is not IP.
type etherDevice struct {
	tap io.ReadWriteCloser
	buf []byte // of Read

	mu   sync.Mutex
	mac  [6]byte // of the device, learnt from what it sends
	send []byte  // of Write
}

func newEtherDevice(tap io.ReadWriteCloser) *etherDevice {
	return &etherDevice{tap: tap, buf: make([]byte, etherHeader+1<<16), mac: [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
}

// Read implements PacketDevice.
func (d *etherDevice) Read(b []byte) (int, error) {
	for {
		n, err := d.tap.Read(d.buf)
		if err != nil {
			return 0, err
		}
		f := d.buf[:n]
		if n < etherHeader || f[6]&1 != 0 {
			continue
		}
		d.mu.Lock()
		d.mac = [6]byte(f[6:12])
		d.mu.Unlock()
		body := f[etherHeader:]
		switch binary.BigEndian.Uint16(f[12:]) {
		case etherARP:
			err = d.reply(etherARP, answerARP(body))
		case etherIPv6:
			if a := answerND(body); a != nil {
				err = d.reply(etherIPv6, a)
			} else if n = unpadded(body, 6, 40); n > 0 {
				return copy(b, body[:n]), nil
			}
		case etherIPv4:
			if n = unpadded(body, 4, 0); n > 0 {
				return copy(b, body[:n]), nil
			}
		}
		if err != nil {
			return 0, err
		}
	}
}

// unpadded is the length of an IP packet without the bytes that fill a short
// Ethernet frame; 0 when there is none.
func unpadded(b []byte, version byte, base int) int {
	at := 2
	if version == 6 {
		at = 4
	}
	if len(b) < 20 || b[0]>>4 != version {
		return 0
	}
	if n := base + int(binary.BigEndian.Uint16(b[at:])); n <= len(b) {
		return n
	}
	return 0
}

func (d *etherDevice) reply(ether uint16, body []byte) error {
	if body == nil {
		return nil
	}
	return d.frame(ether, body)
}

// Write implements PacketDevice.
func (d *etherDevice) Write(b []byte) (int, error) {
	ether := uint16(etherIPv4)
	if len(b) > 0 && b[0]>>4 == 6 {
		ether = etherIPv6
	}
	if err := d.frame(ether, b); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (d *etherDevice) frame(ether uint16, body []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.send = append(append(d.send[:0], d.mac[:]...), peerMAC[:]...)
	d.send = append(binary.BigEndian.AppendUint16(d.send, ether), body...)
	_, err := d.tap.Write(d.send)
	return err
}

// Close implements PacketDevice.
func (d *etherDevice) Close() error { return d.tap.Close() }

// answerARP answers a question for any address but the asker's own, which is a
// probe for duplicates (RFC 5227). Nil: there is nothing to answer.
func answerARP(b []byte) []byte {
	if len(b) < arpLength || !bytes.Equal(b[:8], []byte{0, 1, 8, 0, 6, 4, 0, 1}) {
		return nil
	}
	sender, target := b[14:18], b[24:28]
	if bytes.Equal(sender, target) || bytes.Equal(sender, make([]byte, 4)) {
		return nil
	}
	a := append(make([]byte, 0, arpLength), 0, 1, 8, 0, 6, 4, 0, 2)
	a = append(append(a, peerMAC[:]...), target...)
	return append(a, b[8:18]...)
}

// answerND answers a neighbour solicitation for any address but with a source,
// which a probe for duplicates lacks (RFC 4861, section 4.3 and 4.4).
func answerND(b []byte) []byte {
	const ip, solicitation = 40, 40 + 24
	if len(b) < solicitation || b[6] != 58 || b[ip] != 135 || bytes.Equal(b[8:24], make([]byte, 16)) {
		return nil
	}
	a := make([]byte, solicitation+8)
	a[0], a[5], a[6], a[7] = 0x60, 32, 58, 255
	copy(a[8:24], b[ip+8:ip+24]) // from the address asked for
	copy(a[24:40], b[8:24])
	a[ip], a[ip+4] = 136, 0x60 // solicited, override
	copy(a[ip+8:], b[ip+8:ip+24])
	a[ip+24], a[ip+25] = 2, 1 // target link-layer address, 8 bytes
	copy(a[ip+26:], peerMAC[:])
	binary.BigEndian.PutUint16(a[ip+2:], icmp6Checksum(a))
	return a
}

// icmp6Checksum of a packet whose checksum field is zero (RFC 4443, section 2.3).
func icmp6Checksum(b []byte) uint16 {
	sum := uint32(58 + len(b) - 40)
	for i := 8; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// releasedReader makes Close end a Read, for devices whose own does not
// (songgao/water on Windows). The goroutine that waits in the device's Read
// lives until the device gives one more packet or the process ends.
type releasedReader struct {
	io.ReadWriteCloser
	frames chan []byte // read
	free   chan []byte
	err    error // set before frames is closed
	done   chan struct{}
	once   sync.Once
}

func newReleasedReader(dev io.ReadWriteCloser, size int) *releasedReader {
	r := &releasedReader{ReadWriteCloser: dev, frames: make(chan []byte, 256), free: make(chan []byte, 256), done: make(chan struct{})}
	go r.loop(size)
	return r
}

func (r *releasedReader) loop(size int) {
	defer close(r.frames)
	made := 0
	for {
		var b []byte
		select {
		case b = <-r.free:
		default:
			if made < cap(r.free) {
				b, made = make([]byte, size), made+1
				break
			}
			select {
			case b = <-r.free:
			case <-r.done:
				return
			}
		}
		n, err := r.ReadWriteCloser.Read(b[:cap(b)])
		if err != nil {
			r.err = err
			return
		}
		select {
		case r.frames <- b[:n]:
		case <-r.done:
			return
		}
	}
}

// Read gives the next frame, or os.ErrClosed after Close.
func (r *releasedReader) Read(b []byte) (int, error) {
	select {
	case <-r.done:
		return 0, os.ErrClosed
	case f, ok := <-r.frames:
		if !ok {
			return 0, r.err
		}
		n := copy(b, f)
		r.free <- f
		return n, nil
	}
}

// Close ends Read at once. The device's own Close is called, and not waited for.
func (r *releasedReader) Close() error {
	r.once.Do(func() {
		close(r.done)
		go r.ReadWriteCloser.Close()
	})
	return nil
}
