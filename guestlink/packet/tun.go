package packet

import (
	"errors"
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/tun"

	"sekisho/guestlink"
)

// tunHeadroom is room before each packet for the header that wireguard/tun puts
// there (10 bytes), rounded up.
const tunHeadroom = 16

// firstMTU is what a TUN device has before a Config is known.
const firstMTU = 1500

// tunBatch is the most packets given to wireguard/tun at once.
const tunBatch = 64

// batchTUN moves batches by wireguard/tun, which segments and coalesces where
// the device can. On Windows the device is Wintun.
type batchTUN struct {
	tun   tun.Device
	read  [][]byte
	sizes []int
	got   [][]byte

	mu    sync.Mutex
	write [][]byte
	slots [][]byte

	drained chan struct{}
}

func newBatchTUN(dev tun.Device) *batchTUN {
	n := dev.BatchSize()
	d := &batchTUN{tun: dev, read: make([][]byte, n), sizes: make([]int, n), drained: make(chan struct{})}
	go func() { // wireguard/tun stops when nobody hears its events
		defer close(d.drained)
		for range dev.Events() {
		}
	}()
	for i := range d.read {
		d.read[i] = make([]byte, tunHeadroom+guestlink.MaxPacket) // touched only as far as packets reach
	}
	return d
}

// ReadBatch implements BatchDevice.
func (d *batchTUN) ReadBatch() ([][]byte, error) {
	n, err := d.tun.Read(d.read, d.sizes, tunHeadroom)
	if err != nil && !errors.Is(err, tun.ErrTooManySegments) {
		return nil, err
	}
	d.got = d.got[:0]
	for i := range n {
		d.got = append(d.got, d.read[i][tunHeadroom:tunHeadroom+d.sizes[i]])
	}
	return d.got, nil
}

// WriteBatch implements BatchDevice. wireguard/tun says which writes failed, not
// which packets: after a failure a part of the batch counts as lost that is at
// least as large.
func (d *batchTUN) WriteBatch(packets [][]byte) (lost int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(packets) > 0 {
		n := min(len(packets), tunBatch)
		d.slots = d.slots[:0]
		for i, p := range packets[:n] {
			if i == len(d.write) {
				d.write = append(d.write, make([]byte, tunHeadroom+guestlink.MaxPacket+1))
			}
			b := d.write[i][:tunHeadroom+len(p)]
			copy(b[tunHeadroom:], p)
			d.slots = append(d.slots, b)
		}
		packets = packets[n:]
		if _, werr := d.tun.Write(d.slots, tunHeadroom); werr != nil {
			if errors.Is(werr, os.ErrClosed) {
				return lost + n + len(packets), os.ErrClosed
			}
			lost += n
			err = werr
		}
	}
	return lost, err
}

// Read implements PacketDevice, for those that know no batches.
func (d *batchTUN) Read(b []byte) (int, error) {
	sizes := []int{0}
	for {
		n, err := d.tun.Read([][]byte{b}, sizes, 0)
		if n > 0 || err != nil {
			return sizes[0], err
		}
	}
}

// Write implements PacketDevice.
func (d *batchTUN) Write(b []byte) (int, error) {
	lost, err := d.WriteBatch([][]byte{b})
	return len(b) * (1 - lost), err
}

// Close closes the device, which ends reads.
func (d *batchTUN) Close() error {
	err := d.tun.Close()
	<-d.drained
	return err
}
