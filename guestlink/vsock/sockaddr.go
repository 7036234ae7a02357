package vsock

import (
	"encoding/binary"
	"fmt"
	"math"
)

// bufferSize in bytes is what either end may have on the way: enough for a
// memory-speed link, little enough that a slow one does not wait long in it.
// The driver cuts it to SO_VM_SOCKETS_BUFFER_MAX_SIZE, which is raised first.
const bufferSize = 1 << 20

// sockaddr returns viosock's struct sockaddr_vm: family, two reserved bytes,
// port and context id, in the machine's order (little endian on Windows).
func sockaddr(family uint16, cid, port uint32) [12]byte {
	var a [12]byte
	binary.LittleEndian.PutUint16(a[0:], family)
	binary.LittleEndian.PutUint32(a[4:], port)
	binary.LittleEndian.PutUint32(a[8:], cid)
	return a
}

// parseFamily reads what the viosock driver answers to IOCTL_GET_AF.
func parseFamily(b []byte) (uint16, error) {
	if len(b) != 4 {
		return 0, fmt.Errorf("vsock: viosock answered %d bytes for its address family, want 4", len(b))
	}
	v := binary.LittleEndian.Uint32(b)
	if v == 0 || v > math.MaxUint16 {
		return 0, fmt.Errorf("vsock: viosock answered address family %d", v)
	}
	return uint16(v), nil
}
