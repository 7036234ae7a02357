package packet

import (
	"fmt"

	"github.com/songgao/water"
	"golang.zx2c4.com/wireguard/tun"
)

// tapFrame is the longest frame in bytes that the TAP driver gives.
const tapFrame = 16 << 10

// OpenTUN creates a Wintun adapter of that name. It needs wintun.dll beside the
// program or in System32, and Administrators' or LocalSystem's rights. A missing
// library is an error, although the package that loads it panics.
func OpenTUN(name string) (dev PacketDevice, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("wintun adapter %s: %v; is wintun.dll beside guestagent.exe?", name, r)
		}
	}()
	d, err := tun.CreateTUN(name, firstMTU)
	if err != nil {
		return nil, fmt.Errorf("wintun adapter %s: %w; is wintun.dll beside guestagent.exe?", name, err)
	}
	return newBatchTUN(d), nil
}

// OpenTAP opens the TAP adapter of that name (OpenVPN's tap-windows6, component
// tap0901), or the first one for an empty name, and returns the name that
// Windows shows for it.
func OpenTAP(name string) (dev PacketDevice, adapter string, err error) {
	c := water.Config{DeviceType: water.TAP}
	c.ComponentID, c.InterfaceName = "tap0901", name
	d, err := water.New(c)
	if err != nil {
		return nil, "", fmt.Errorf("tap adapter %q: %w; is tap-windows6 installed?", name, err)
	}
	return newEtherDevice(newReleasedReader(d, tapFrame)), d.Name(), nil
}
