//go:build linux

package gateway

import (
	"context"
	"log/slog"
	"net"
	"time"

	"sekisho/netd/kernel"
	"sekisho/netd/tunnel"
)

// holdEvery is how often the kernel is compared with the plan: a reload of the
// server's own firewall may have taken our table away.
const holdEvery = 5 * time.Second

// Host is the gateway's part of its server's kernel.
type Host struct {
	ns     *kernel.Namespace
	config *Config
}

// Setup makes the TUN device and applies the configuration's plan to the
// network namespace of this process. Close the device and the Host.
func Setup(config *Config) (*Host, *tunnel.Device, error) {
	ns, err := kernel.Open(kernel.Current)
	if err != nil {
		return nil, nil, err
	}
	dev, err := ns.CreateTUN(config.Tun, config.MTU)
	if err == nil {
		if err = ns.Apply(config.Plan()); err != nil {
			dev.Close()
		}
	}
	if err != nil {
		ns.Close()
		return nil, nil, err
	}
	return &Host{ns, config}, tunnel.NewDevice(dev), nil
}

// Hold keeps the plan in force until ctx is done.
func (h *Host) Hold(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(holdEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := h.ns.Apply(h.config.Plan()); err != nil && ctx.Err() == nil {
				log.Error("kernel does not hold the plan", "err", err)
			}
		}
	}
}

// Close releases the namespace. What was applied stays until the device goes.
func (h *Host) Close() { h.ns.Close() }

// Sockets listens on TCP and UDP.
func (c *Config) Sockets() (net.Listener, net.PacketConn, error) {
	tcp, err := net.Listen("tcp", c.Listen.String())
	if err != nil {
		return nil, nil, err
	}
	udp, err := net.ListenPacket("udp", c.Listen.String())
	if err != nil {
		tcp.Close()
		return nil, nil, err
	}
	return tcp, udp, nil
}
