package tunnel

import (
	"errors"
	"fmt"
	"sync"

	"golang.zx2c4.com/wireguard/tun"
)

const (
	// headroom before each packet for the virtio-net header that
	// wireguard/tun puts there (10 bytes), rounded up.
	headroom = 16
	// room for a packet that wireguard/tun grows by the following ones of the
	// same flow (generic receive offload).
	room = headroom + 1<<16
	// MaxMTU is the largest inner MTU in bytes.
	MaxMTU = 9000
	// MinMTU is the smallest inner MTU in bytes (RFC 791: 576 must be accepted).
	MinMTU = 576
)

// Device moves batches of IP packets from and to a TUN device with segmentation
// offload: one system call for many packets of a flow.
type Device struct {
	tun tun.Device

	read  [][]byte // buffers of ReadBatch
	sizes []int
	got   [][]byte

	mu    sync.Mutex // guards write and slots
	write [][]byte   // buffers of WriteBatch, made on demand
	slots [][]byte
}

// NewDevice wraps dev, whose inner packets are at most MaxMTU bytes.
func NewDevice(dev tun.Device) *Device {
	n := dev.BatchSize()
	d := &Device{tun: dev, read: make([][]byte, n), sizes: make([]int, n), got: make([][]byte, 0, n), write: make([][]byte, n)}
	for i := range d.read {
		d.read[i] = make([]byte, headroom+MaxMTU)
	}
	return d
}

// ReadBatch waits for packets. They are valid until the next call. One
// goroutine may read at a time.
func (d *Device) ReadBatch() ([][]byte, error) {
	n, err := d.tun.Read(d.read, d.sizes, headroom)
	if err != nil && !errors.Is(err, tun.ErrTooManySegments) {
		return nil, fmt.Errorf("read tun device: %w", err)
	}
	d.got = d.got[:0]
	for i := range n {
		d.got = append(d.got, d.read[i][headroom:headroom+d.sizes[i]])
	}
	return d.got, nil
}

// WriteBatch writes packets, which it copies: they may lie in one buffer. A
// device that is down loses them, as a cable would.
func (d *Device) WriteBatch(packets [][]byte) error {
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
			slot := d.write[i][:headroom+len(p)]
			copy(slot[headroom:], p)
			d.slots = append(d.slots, slot)
		}
		packets = packets[n:]
		if len(d.slots) == 0 {
			continue
		}
		if _, err := d.tun.Write(d.slots, headroom); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Close closes the TUN device, which ends ReadBatch.
func (d *Device) Close() error { return d.tun.Close() }
