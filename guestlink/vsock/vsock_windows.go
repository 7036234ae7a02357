package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// errPlatform is what both ends return on Windows, where AF_VSOCK needs the
// socket provider of virtio-win's viosock driver.
var errPlatform = fmt.Errorf("vsock: not on this platform yet: %w", errors.ErrUnsupported)

// Listen returns an error that wraps errors.ErrUnsupported.
func Listen(own, port, peer uint32) (*Listener, error) { return nil, errPlatform }

// Dial returns an error that wraps errors.ErrUnsupported.
func Dial(ctx context.Context, cid, port uint32) (net.Conn, error) { return nil, errPlatform }
