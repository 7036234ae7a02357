package packet

import "io"

// PacketDevice is a TUN device: every Read gives one IP packet, every Write
// takes one. Close ends a Read that is waiting.
type PacketDevice interface {
	io.ReadWriteCloser
}

// BatchDevice moves many packets by one call.
type BatchDevice interface {
	// ReadBatch waits for packets. They are valid until the next call.
	ReadBatch() ([][]byte, error)
	// WriteBatch writes packets, which it copies, and says how many were lost.
	WriteBatch(packets [][]byte) (lost int, err error)
}

// OffloadDevice moves packets with their virtio-net header in front
// (guestlink.VirtioHeaderSize bytes), unsegmented.
type OffloadDevice interface {
	// ReadOffload calls idle before it waits, and looks again if that says that
	// it took a while.
	ReadOffload(b []byte, idle func() bool) (int, error)
	WriteOffload(b []byte) (int, error)
}
