//go:build !linux

package packet

import "net"

// directWriter is of Linux only: Winsock's calls wait.
type directWriter struct{}

func newDirectWriter(net.Conn) *directWriter { return nil }

func (*directWriter) write([]byte) int { return 0 }
