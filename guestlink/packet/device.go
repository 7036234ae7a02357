package packet

// PacketDevice is a TUN device: every Read gives one IP packet, every Write
// takes one. Close ends a Read that is waiting.
type PacketDevice interface {
	Read(packet []byte) (int, error)
	Write(packet []byte) (int, error)
	Close() error
}
