package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/guestlink"
	"sekisho/hostos/disk"
	"sekisho/images/lab/hook"
	"sekisho/images/lab/stream"
)

// TestBoot is one boot with attestation, and in it the faults that a running
// laptop meets.
func TestBoot(t *testing.T) {
	b := realLab(t)
	if _, err := b.Up(t.Context(), Boot{Life: certificateLife, Stay: true, NoSite: true}); err != nil {
		t.Fatal(err)
	}
	t.Run("site down at boot", func(t *testing.T) {
		b.untilState(t, "attestd", "unreachable", "verifier-unreachable")
		b.untilState(t, "netd", "Attesting", "")
		// A new laptop: its disk waits for the recovery key to be in escrow.
		b.until(t, "the disk to wait", func(ctx context.Context) bool {
			d, err := b.Disk(ctx)
			return err == nil && d.State == disk.Making && d.Detail != ""
		})
		b.killAll(t)
		b.untilState(t, "attestd", "unreachable", "verifier-unreachable")
		b.untilState(t, "netd", "Attesting", "")
		b.cleanUplink(t, false)
		if err := b.StartVerifier(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.untilState(t, "attestd", "affirming", "")
		b.untilState(t, "netd", "Attesting", "gateway-unreachable")
		b.untilWork(t)
		b.noPage(t)
		if err := b.StartGateway(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.untilState(t, "netd", "Tunnel", "")
	})
	b.untilPage(t)
	b.until(t, "the page over IPv6", func(ctx context.Context) bool {
		a, err := b.Exec(ctx, hook.Work, "fetch", "-timeout", "3s", PageURL6)
		return err == nil && a.Exit == 0 && string(a.Stdout) == pageText
	})
	b.cleanUplink(t, true)

	b.scenario(t, "nothing wrong", func(t *testing.T) {})
	b.scenario(t, "gateway killed", func(t *testing.T) {
		must(t, b.Kill(t.Context(), "gateway"))
		b.untilState(t, "netd", "Attesting", "gateway-unreachable")
		b.noPage(t)
		must(t, b.StartGateway(t.Context()))
		b.untilState(t, "netd", "Tunnel", "")
	})
	b.scenario(t, "verifier killed", func(t *testing.T) {
		must(t, b.Kill(t.Context(), "verifier"))
		b.untilState(t, "netd", "Tunnel", "") // what was proved holds until the certificate lapses
		must(t, b.StartVerifier(t.Context()))
	})
	b.scenario(t, "device suspended and resumed", func(t *testing.T) {
		device, err := b.deviceID(t.Context())
		must(t, err)
		begin := time.Now()
		_, err = b.attestctl(t.Context(), nil, "suspend", "device", device, "-reason", "drill")
		must(t, err)
		b.untilState(t, "netd", "Attesting", "")
		t.Logf("the tunnel was seen closed %.1f s after the suspension", time.Since(begin).Seconds())
		b.noPage(t)
		_, err = b.attestctl(t.Context(), nil, "resume", "device", device)
		must(t, err)
		b.untilState(t, "netd", "Tunnel", "")
	})
	b.scenario(t, "certificate lapses, verifier away", func(t *testing.T) {
		must(t, b.Kill(t.Context(), "verifier"))
		end := b.untilLapse(t)
		late := time.Since(end)
		t.Logf("the tunnel was seen closed %.1f s after the certificate's end", late.Seconds())
		if late > 15*time.Second { // a look at the laptop takes a while in software emulation
			t.Errorf("the tunnel closed %s late", late)
		}
		b.noPage(t)
		must(t, b.StartVerifier(t.Context()))
		b.untilState(t, "netd", "Tunnel", "")
	})
	for _, service := range []string{"netd", "attestd", "linkd"} {
		b.scenario(t, service+" killed", func(t *testing.T) { b.killService(t, service) })
	}
	b.scenario(t, "linkd killed under a connection", b.connectionSurvives)
	b.frames(t)
	b.scenario(t, "other vsock ports", func(t *testing.T) {
		for _, port := range []int{1, 22, 443, 1023, 1025, 1099, 5000, 65535} {
			a, err := b.Exec(t.Context(), hook.Work, "labguest", "dial", fmt.Sprint(port))
			if err != nil || a.Exit != 0 || strings.TrimSpace(string(a.Stdout)) != "refused" {
				t.Errorf("port %d: %q %q, %v", port, a.Stdout, a.Stderr, err)
			}
		}
	})
	// Last: the work domain starts anew, and what runs in it ends.
	t.Run("qemu killed", func(t *testing.T) {
		before, err := b.measuredStarts(t.Context())
		must(t, err)
		b.killService(t, "vmm")
		b.untilPage(t)
		b.until(t, "the new start to be measured", func(ctx context.Context) bool {
			n, err := b.measuredStarts(ctx)
			return err == nil && n == before+1
		})
		b.cleanUplink(t, true)
	})
	t.Run("the check sees a packet that should not be there", func(t *testing.T) {
		must(t, inNamespace("sekisho-home", func() error {
			c, err := net.Dial("udp4", "192.168.50.255:9")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("astray"))
			return err
		}))
		b.until(t, "the packet to be recorded", func(context.Context) bool {
			r, err := b.CheckUplink()
			return err == nil && r.Leaked == 1 && r.Leaks[0].Destination == "192.168.50.255:9"
		})
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// untilLapse waits until netd has closed the tunnel for want of a credential
// and returns when the last certificate ended.
func (b *bench) untilLapse(t *testing.T) time.Time {
	t.Helper()
	var end time.Time
	b.until(t, "the certificate to lapse", func(ctx context.Context) bool {
		if d, err := b.Daemon(ctx, "attestd"); err == nil && d.State == "affirming" {
			end = notAfter(t, d)
		}
		d, err := b.Daemon(ctx, "netd")
		return err == nil && d.State != "Tunnel"
	})
	if end.IsZero() || time.Now().Before(end) {
		t.Errorf("the tunnel closed before the certificate's end at %s", end)
	}
	return end
}

// notAfter is until when attestd's credential is good.
func notAfter(t *testing.T, d DaemonStatus) time.Time {
	t.Helper()
	s, err := gate.ParseStatus(d.Body)
	must(t, err)
	return s.NotAfter
}

// killService kills a service of the host domain and waits for its successor.
func (b *bench) killService(t *testing.T, name string) {
	t.Helper()
	old, err := b.ServicePID(t.Context(), name)
	must(t, err)
	a, err := b.Exec(t.Context(), hook.Host, "kill", "-9", fmt.Sprint(old))
	if err != nil || a.Exit != 0 {
		t.Fatalf("kill %s: %+v, %v", name, a, err)
	}
	b.until(t, name+" to be restarted", func(ctx context.Context) bool {
		pid, err := b.ServicePID(ctx, name)
		return err == nil && pid != old
	})
}

// killAll kills netd, attestd and linkd.
func (b *bench) killAll(t *testing.T) {
	t.Helper()
	for _, service := range []string{"linkd", "attestd", "netd"} {
		b.killService(t, service)
	}
}

// connectionSurvives kills linkd while the work domain sends by TCP: every byte
// arrives all the same, over the same connection.
func (b *bench) connectionSurvives(t *testing.T) {
	const count = 2 << 20
	var l net.Listener
	must(t, inNamespace("sekisho-lgwan", func() (err error) {
		l, err = net.Listen("tcp4", sinkAddress)
		return err
	}))
	defer l.Close()
	begun, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		close(begun)
		if err == nil {
			var r stream.Result
			if r, err = stream.Receive(conn, false); err == nil && r.Bytes < count {
				err = fmt.Errorf("%d bytes of %d", r.Bytes, count)
			}
			conn.Close()
		}
		ended <- err
	}()
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Work, Timeout: time.Minute, Detach: true,
		Argv: []string{"labguest", "stream", "-tcp", sinkAddress, fmt.Sprint(count)}})
	if err != nil || a.Error != "" {
		t.Fatalf("stream: %v %s", err, a.Error)
	}
	limit := time.After(3 * time.Minute)
	select {
	case <-begun:
	case <-limit:
		t.Fatal("the connection did not begin")
	}
	b.killService(t, "linkd")
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-limit:
		t.Error("the stream did not end")
	}
}

// frames sends what a hostile work domain could send to the published port.
func (b *bench) frames(t *testing.T) {
	hello := guestlink.AppendHello(nil, guestlink.Hello{Version: guestlink.Version})
	frame := func(kind byte, length int, payload []byte) []byte {
		head := binary.BigEndian.AppendUint32(nil, uint32(length))
		head[0] = kind
		return append(head, payload...)
	}
	packet := byte(guestlink.TypePacket)
	for name, data := range map[string][]byte{
		"nothing":               nil,
		"no hello":              frame(packet, 20, make([]byte, 20)),
		"noise":                 bytes.Repeat([]byte{0xff}, 100000),
		"empty packet":          append(bytes.Clone(hello), frame(packet, 0, nil)...),
		"oversized packet":      append(bytes.Clone(hello), frame(packet, 1<<24-1, make([]byte, 100000))...),
		"oversized control":     append(bytes.Clone(hello), frame(byte(guestlink.TypeStatus), 1<<20, make([]byte, 100000))...),
		"truncated packet":      append(bytes.Clone(hello), frame(packet, 1400, make([]byte, 700))...),
		"half a header":         append(bytes.Clone(hello), packet, 0),
		"unknown type":          append(bytes.Clone(hello), frame(200, 4, make([]byte, 4))...),
		"not an IP packet":      append(bytes.Clone(hello), frame(packet, 64, bytes.Repeat([]byte{0x10}, 64))...),
		"configuration upwards": append(bytes.Clone(hello), frame(byte(guestlink.TypeConfig), 2, []byte("{}"))...),
	} {
		b.scenario(t, "frames: "+name, func(t *testing.T) {
			pid, err := b.ServicePID(t.Context(), "linkd")
			must(t, err)
			a, err := b.Call(t.Context(), hook.Request{Target: hook.Work, Stdin: data,
				Argv: []string{"labguest", "dial", "-wait", "1s", fmt.Sprint(guestlink.PortPackets)}})
			if err != nil || a.Exit != 0 {
				t.Fatalf("dial: %+v, %v", a, err)
			}
			t.Logf("%s", bytes.TrimSpace(a.Stdout))
			if now, err := b.ServicePID(t.Context(), "linkd"); err != nil || now != pid {
				t.Errorf("linkd had process id %d, now %d, %v: it did not live through it", pid, now, err)
			}
		})
	}
}

// TestTampered boots properly signed images that were never released.
func TestTampered(t *testing.T) {
	b := realLab(t)
	for _, component := range Components() {
		t.Run(component, func(t *testing.T) {
			image, err := b.Tamper(component)
			must(t, err)
			r, err := b.Up(t.Context(), Boot{Image: image})
			if !Refused(err) {
				t.Fatalf("the boot ended with %v, want a refusal", err)
			}
			if !strings.Contains(err.Error(), component) {
				t.Errorf("the refusal does not name %s: %v", component, err)
			}
			t.Log(err)
			for _, s := range r.Stages {
				if s.Name == StageAttested || s.Name == StageTunnel || s.Name == StagePage {
					t.Errorf("stage %q was reached", s.Name)
				}
			}
			d := b.untilState(t, "attestd", "refused", "")
			if d.Reason == "" || !strings.Contains(d.Detail, component) {
				t.Errorf("attestd's status does not name %s: %+v", component, d)
			}
			b.untilState(t, "netd", "Attesting", "")
			b.cleanUplink(t, false)
		})
	}
}

// TestUnsigned boots an image without signature.
func TestUnsigned(t *testing.T) {
	b := realLab(t)
	image, err := b.Unsign()
	must(t, err)
	_, err = b.Up(t.Context(), Boot{Image: image})
	if !FirmwareRefused(err) {
		t.Fatalf("the boot ended with %v, want the firmware's refusal", err)
	}
	r, err := b.CheckUplink()
	must(t, err)
	if r.Frames != 0 {
		t.Errorf("the laptop sent something: %s", &r)
	}
}

// TestNoTPM boots a machine without TPM.
func TestNoTPM(t *testing.T) {
	b := realLab(t)
	_, err := b.Up(t.Context(), Boot{NoTPM: true})
	if !Refused(err) || !strings.Contains(err.Error(), "TPM") {
		t.Fatalf("the boot ended with %v, want a refusal that names the TPM", err)
	}
	b.untilState(t, "attestd", "no-tpm", "no-tpm")
	b.untilState(t, "netd", "Attesting", "") // with an uplink, and no further
	b.cleanUplink(t, false)
}

// measuredStarts counts the starts of the work domain that the verifier's last
// result shows.
func (b *bench) measuredStarts(ctx context.Context) (int, error) {
	out, err := b.attestctl(ctx, nil, "result", "last")
	return strings.Count(string(out), "work-domain-started"), err
}
