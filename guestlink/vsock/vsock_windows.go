package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"
)

// The interface of virtio-win's viosock driver (viosock/inc/vio_sockets.h and
// viosock/sys/public.h of kvm-guest-drivers-windows).
const (
	viosockDevice = `\??\Viosock`
	ioctlGetAF    = 0x0801300c // IOCTL_GET_AF: the address family, 32 bit

	optBufferSize    = 0x6000 // SO_VM_SOCKETS_BUFFER_SIZE, level: the address family
	optBufferMaxSize = 0x6002 // SO_VM_SOCKETS_BUFFER_MAX_SIZE
)

const winsock22 = 0x0202 // Winsock 2.2 (MAKEWORD(2, 2))

// Listen returns an error that wraps errors.ErrUnsupported: the host domain is
// never Windows.
func Listen(own, port, peer uint32) (*Listener, error) {
	return nil, fmt.Errorf("vsock: listen on windows: %w", errors.ErrUnsupported)
}

// Dial connects to port of context id cid by the viosock driver's socket
// provider.
func Dial(ctx context.Context, cid, port uint32) (net.Conn, error) {
	family, err := addressFamily()
	if err != nil {
		return nil, err
	}
	var data windows.WSAData
	if err := windows.WSAStartup(winsock22, &data); err != nil {
		return nil, fmt.Errorf("vsock: start winsock: %w", err)
	}
	h, err := windows.WSASocket(int32(family), windows.SOCK_STREAM, 0, nil, 0, 0)
	if err != nil {
		windows.WSACleanup()
		return nil, fmt.Errorf("vsock: socket of family %d: %w; is viosock's socket provider installed?", family, err)
	}
	c := &blockingConn{s: winSocket{h}, remote: Addr{CID: cid, Port: port}}
	grow(h, family)
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err := connect(h, family, cid, port); err != nil {
		c.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("vsock: dial cid %d port %d: %w", cid, port, err)
	}
	return c, nil
}

// addressFamily asks the driver which number its address family has.
func addressFamily() (uint16, error) {
	name, err := windows.UTF16PtrFromString(viosockDevice)
	if err != nil {
		return 0, err
	}
	h, err := windows.CreateFile(name, windows.GENERIC_READ, windows.FILE_SHARE_READ, nil, windows.OPEN_EXISTING, windows.FILE_ATTRIBUTE_NORMAL, 0)
	if err != nil {
		return 0, fmt.Errorf("vsock: open viosock: %w; is virtio-win's viosock driver installed?", err)
	}
	defer windows.CloseHandle(h)
	var out [4]byte
	var n uint32
	if err := windows.DeviceIoControl(h, ioctlGetAF, nil, 0, &out[0], uint32(len(out)), &n, nil); err != nil {
		return 0, fmt.Errorf("vsock: ask viosock for its address family: %w", err)
	}
	return parseFamily(out[:min(int(n), len(out))])
}

// grow asks for the buffer of the guest link; a driver that refuses keeps its
// own. The maximum comes first, because the size is cut to it.
func grow(h windows.Handle, family uint16) {
	var v [8]byte
	binary.LittleEndian.PutUint64(v[:], bufferSize)
	for _, opt := range []int32{optBufferMaxSize, optBufferSize} {
		windows.Setsockopt(h, int32(family), opt, &v[0], int32(len(v)))
	}
}

// connect calls Winsock's connect, which x/sys/windows offers only for the
// address families that it knows.
func connect(h windows.Handle, family uint16, cid, port uint32) error {
	a := sockaddr(family, cid, port)
	proc := windows.NewLazySystemDLL("ws2_32.dll").NewProc("connect")
	if r, _, err := proc.Call(uintptr(h), uintptr(unsafe.Pointer(&a[0])), uintptr(len(a))); int32(r) != 0 {
		return err
	}
	return nil
}

// winSocket is a blocking Winsock stream.
type winSocket struct{ h windows.Handle }

func (s winSocket) Send(b []byte) (int, error) {
	buf := windows.WSABuf{Len: uint32(len(b)), Buf: &b[0]}
	var n uint32
	err := windows.WSASend(s.h, &buf, 1, &n, 0, nil, nil)
	return int(n), closed(err)
}

func (s winSocket) Recv(b []byte) (int, error) {
	buf := windows.WSABuf{Len: uint32(len(b)), Buf: &b[0]}
	var n, flags uint32
	err := windows.WSARecv(s.h, &buf, 1, &n, &flags, nil, nil)
	return int(n), closed(err)
}

// Close shuts the stream down first, so that calls in other threads end before
// the handle is free to be used again.
func (s winSocket) Close() error {
	windows.Shutdown(s.h, windows.SHUT_RDWR)
	err := windows.Closesocket(s.h)
	windows.WSACleanup()
	return err
}

func closed(err error) error {
	if errors.Is(err, windows.WSAEINTR) || errors.Is(err, windows.WSAENOTSOCK) || errors.Is(err, windows.WSAESHUTDOWN) {
		return os.ErrClosed
	}
	return err
}
