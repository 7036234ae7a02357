//go:build linux

package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd"
	"sekisho/netd/gateway"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

// roleVariable in its environment makes the test binary play a part of a tunnel
// in its own process and namespace, configured by a JSON document on its
// standard input, instead of running tests.
const roleVariable = "SEKISHO_E2E_ROLE"

// roleConfig is what a role needs.
type roleConfig struct {
	Tun string // name of the TUN device to make
	MTU int

	// Of the gateway and the laptop.
	Listen  string
	Gateway string
	Chain   string // PEM
	Key     string // PEM
	Peers   string // PEM: CA of the peer's certificate
	Leases  string
	Only    connectip.Carriage
	NoUDP   bool
	Pool    netip.Prefix
	Pool6   netip.Prefix
	// Agreement is the least key agreement.
	Agreement cryptrec.KeyAgreement
	DNS       []netip.Addr

	WireGuard string // configuration in wireguard-go's own form
}

// order is a line on the laptop's standard input, report one on its output.
type order struct {
	Up, Rebind *tunnel.Path
	Proxy      netip.AddrPort
	Quit       bool
}
type report struct {
	Err        string
	Open       bool
	Suspect    bool
	Carriage   string
	Cipher     string
	Path       tunnel.Path
	Assignment tunnel.Assignment
	Counters   netd.Counters
}

func playRole(role string) int {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return 1
	}
	var c roleConfig
	if err := json.Unmarshal(line, &c); err != nil {
		fmt.Println(err)
		return 1
	}
	dev, err := tun.CreateTUN(c.Tun, c.MTU)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	play := map[string]func(roleConfig, tun.Device, *bufio.Reader) error{"gateway": playGateway, "laptop": playLaptop, "wireguard": playWireGuard}[role]
	if err := play(c, dev, in); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func ready() { fmt.Println("{}") }

func playWireGuard(c roleConfig, dev tun.Device, in *bufio.Reader) error {
	d := device.NewDevice(dev, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	if err := d.IpcSet(c.WireGuard); err != nil {
		return err
	}
	if err := d.Up(); err != nil {
		return err
	}
	ready()
	io.Copy(io.Discard, in)
	return nil
}

func playGateway(c roleConfig, dev tun.Device, in *bufio.Reader) error {
	config := &gateway.Config{Pool: c.Pool, Pool6: c.Pool6, MTU: c.MTU, MaxSessions: 10000, DNS: c.DNS, KeyAgreement: c.Agreement}
	for _, f := range []struct{ name, text string }{{"c", c.Chain}, {"k", c.Key}, {"p", c.Peers}} {
		if err := os.WriteFile(c.Leases+"."+f.name, []byte(f.text), 0o600); err != nil {
			return err
		}
	}
	config.Certificate, config.Key, config.ClientCA = c.Leases+".c", c.Leases+".k", c.Leases+".p"
	t, err := config.TLS()
	if err != nil {
		return err
	}
	leases, err := gateway.OpenLeases(c.Leases, config.Pool)
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return err
	}
	var udp net.PacketConn
	if !c.NoUDP {
		if udp, err = net.ListenPacket("udp", c.Listen); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { io.Copy(io.Discard, in); cancel() }()
	ready()
	debug.SetGCPercent(gateway.GCPercent) // as the command does
	server := gateway.New(config, t, leases, tunnel.NewDevice(dev), slog.New(slog.NewTextHandler(os.Stderr, nil)))
	return server.Serve(ctx, tcp, udp)
}

func playLaptop(c roleConfig, dev tun.Device, in *bufio.Reader) error {
	pair, err := tls.X509KeyPair([]byte(c.Chain), []byte(c.Key))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(c.Peers))
	d := connectip.New(tunnel.NewDevice(dev))
	d.Only = c.Only
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { d.Run(ctx) })
	defer parts.Wait()
	defer cancel()
	ready()
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return nil
		}
		var o order
		if err := json.Unmarshal(line, &o); err != nil {
			return err
		}
		switch {
		case o.Up != nil:
			_, err = d.Up(ctx, tunnel.Target{
				Gateway: attest.Endpoint{Address: netip.MustParseAddrPort(c.Gateway), ServerName: "gateway.test"}, Roots: roots,
				Credential: &pair, Until: pair.Leaf.NotAfter, Path: *o.Up, Proxy: o.Proxy, Agreement: c.Agreement,
			})
		case o.Rebind != nil:
			err = d.Rebind(ctx, *o.Rebind)
		}
		st := d.Status()
		r := report{Open: st.Open, Suspect: st.Suspect, Carriage: st.Carriage, Cipher: st.Cipher, Path: st.Path, Assignment: st.Assignment, Counters: st.Counters}
		if err != nil {
			r.Err = err.Error()
		}
		if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
			return err
		}
	}
}

// role is a running process of one.
type role struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startRole plays a role in ns and returns when it is ready.
func startRole(t testing.TB, ns *nstest.NS, name string, c roleConfig) *role {
	t.Helper()
	r := &role{t: t, cmd: ns.Command(context.Background(), os.Args[0])}
	r.cmd.Env = append(os.Environ(), roleVariable+"="+name)
	var log strings.Builder
	r.cmd.Stderr = &log
	var err error
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.out = bufio.NewReader(out)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.stop()
		if t.Failed() {
			t.Logf("%s said:\n%s", name, log.String())
		}
	})
	if err := json.NewEncoder(r.in).Encode(c); err != nil {
		t.Fatal(err)
	}
	if line, err := r.out.ReadString('\n'); err != nil || line != "{}\n" {
		t.Fatalf("%s: %s, %v", name, line, err)
	}
	return r
}

func (r *role) stop() {
	r.in.Close()
	r.cmd.Process.Kill()
	r.cmd.Wait()
}

// tell gives the laptop an order and waits for its report.
func (r *role) tell(o order) (report, error) {
	var rep report
	if err := json.NewEncoder(r.in).Encode(o); err != nil {
		return rep, err
	}
	line, err := r.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &rep)
	}
	if err == nil && rep.Err != "" {
		err = fmt.Errorf("%s", rep.Err)
	}
	return rep, err
}

// memory is the most that the role had resident, in MiB.
func (r *role) memory() float64 { return mostResident(r.t, r.cmd.Process.Pid) }

// cpu is the processor time that the role has used (proc_pid_stat(5)).
func (r *role) cpu() time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.cmd.Process.Pid))
	if err != nil {
		r.t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}
