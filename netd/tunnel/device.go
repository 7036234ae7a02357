package tunnel

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/tun"
)

const (
	// room for a packet that wireguard/tun grows by the following ones of the
	// same flow (generic receive offload).
	room = FrameHeader + 1<<16
	// MaxMTU is the largest inner MTU in bytes.
	MaxMTU = 9000
	// MinMTU is the smallest inner MTU in bytes (RFC 791: 576 must be accepted).
	MinMTU = 576
)

// Device moves IP packets from and to a TUN device with segmentation offload.
// Trains are passed as the kernel makes and takes them, one system call for
// 64 KiB; single packets of a flow are joined by wireguard/tun where they can be.
type Device struct {
	tun  tun.Device
	file *os.File // of tun, where each read and write has a virtio-net header
	in   []byte   // of Read
	skip int      // bytes of in that Read leaves for the header

	mu    sync.Mutex // guards write and slots
	write [][]byte   // buffers of Write, made on demand
	slots [][]byte
}

// NewDevice wraps dev, a TUN device of the kernel.
func NewDevice(dev tun.Device) *Device {
	d := &Device{tun: dev, file: dev.File(), in: make([]byte, room), write: make([][]byte, dev.BatchSize())}
	if dev.BatchSize() == 1 { // without offload there is no header
		d.skip = FrameHeader
	}
	return d
}

// Read waits for a frame. It is valid until the next call. One goroutine may
// read at a time.
func (d *Device) Read() (Frame, error) {
	for {
		clear(d.in[:FrameHeader])
		n, err := d.file.Read(d.in[d.skip:])
		if err != nil {
			return nil, fmt.Errorf("read tun device: %w", err)
		}
		if f := Frame(d.in[:d.skip+n]); n+d.skip > FrameHeader && f.fromVirtio() == nil {
			return f, nil // the kernel makes no other frames; one that it did is lost
		}
	}
}

// Write writes packets, which it copies: they may lie in one buffer. A device
// that is down loses them, as a cable would.
func (d *Device) Write(packets [][]byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for len(packets) > 0 {
		n := min(len(packets), len(d.write))
		d.slots = d.slots[:0]
		for i, p := range packets[:n] {
			if len(p) > MaxMTU {
				continue
			}
			if d.write[i] == nil {
				d.write[i] = make([]byte, room)
			}
			slot := d.write[i][:FrameHeader+len(p)]
			copy(slot[FrameHeader:], p)
			d.slots = append(d.slots, slot)
		}
		packets = packets[n:]
		if len(d.slots) == 0 {
			continue
		}
		if _, err := d.tun.Write(d.slots, FrameHeader); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// WriteFrame writes a frame, and changes it on the way. A train from a peer
// must have passed Check.
func (d *Device) WriteFrame(f Frame) error {
	switch {
	case !f.Train():
		return d.Write([][]byte{f.Packet()})
	case d.skip != 0 || !f.TCP():
		return f.Split(make([]byte, MaxMTU), func(p []byte) { _ = d.Write([][]byte{p}) })
	}
	if err := f.virtio(); err != nil {
		return err
	}
	_, err := d.file.Write(f)
	return err
}

// Close closes the TUN device, which ends Read.
func (d *Device) Close() error { return d.tun.Close() }
