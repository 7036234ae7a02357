package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"

	"sekisho/images"
	"sekisho/images/lab/hook"
	"sekisho/images/lab/stream"
	"sekisho/images/uki"
	"sekisho/netd"
)

const (
	benchBoots   = 3 // of each kind, one after the other
	benchStreams = 5 // of each kind, one after the other, in one boot
	benchBytes   = 48 << 20

	rawPort   = 1100 // vsock ports of the sinks, open during a benchmark only
	framePort = 1101
)

// sinkAddress receives streams behind the tunnel, and aloneAddress, which is
// nowhere else, at the host domain's end of the guest link.
const (
	sinkAddress  = "10.254.0.80:7008"
	aloneAddress = "10.254.0.81:7008"
)

// Bench is the outcome of a benchmark: medians, and each ratio as the median of
// the rounds' own ratios.
type Bench struct {
	Accel      string             `json:"accel"`
	Stages     map[string]float64 `json:"stages_seconds"`   // since power-on
	Page       float64            `json:"page_seconds"`     // power-on to page read
	Baseline   float64            `json:"baseline_seconds"` // same machine and kernel, an initramfs that powers off
	BootRatio  float64            `json:"boot_ratio"`
	UKI        int64              `json:"uki_bytes"`
	HostMemory int64              `json:"host_memory_bytes"` // without the work domain
	Rates      map[string]float64 `json:"rates_mbps"`
	Ratios     map[string]float64 `json:"ratios"` // to the raw vsock stream of the same round
}

// The streams of a benchmark.
const (
	streamRaw    = "raw vsock"
	streamLink   = "guest link"
	streamAlone  = "TCP over the guest link"
	streamTunnel = "tunnel"
	streamBoth   = "guest link and tunnel"
)

var streams = []string{streamRaw, streamLink, streamAlone, streamTunnel, streamBoth}

// Bench boots the laptop and its yardstick in turn, and measures streams in the
// last boot. It writes out/bench/report.json.
func (l *Lab) Bench(ctx context.Context) (Bench, error) {
	var b Bench
	yardstick, err := l.yardstick(ctx)
	if err != nil {
		return b, err
	}
	stages := map[string][]float64{}
	var page, base, ratio []float64
	for i := range benchBoots {
		l.say("lab: boot %d of %d: the yardstick", i+1, benchBoots)
		t, err := l.timeYardstick(ctx, yardstick)
		if err != nil {
			return b, err
		}
		l.say("lab: boot %d of %d: the laptop", i+1, benchBoots)
		r, err := l.Up(ctx, Boot{})
		if err != nil {
			return b, err
		}
		b.Accel = r.Accel
		for _, s := range r.Stages {
			stages[s.Name] = append(stages[s.Name], s.Seconds)
		}
		last := stages[StagePage][len(stages[StagePage])-1]
		page, base, ratio = append(page, last), append(base, t), append(ratio, last/t)
		if i < benchBoots-1 {
			if err := l.Down(ctx); err != nil {
				return b, err
			}
		}
	}
	b.Stages = map[string]float64{}
	for name, v := range stages {
		b.Stages[name] = median(v)
	}
	b.Page, b.Baseline, b.BootRatio = median(page), median(base), median(ratio)
	b.UKI = size(l.out(images.HostImage))
	if b.HostMemory, err = l.hostMemory(ctx); err != nil {
		return b, err
	}
	if b.Rates, b.Ratios, err = l.benchStreams(ctx); err != nil {
		return b, err
	}
	if err := l.Down(ctx); err != nil {
		return b, err
	}
	return b, writeJSON(l.out("bench", "report.json"), b)
}

// yardstick makes a laptop with the same kernel and an initramfs that switches
// it off.
func (l *Lab) yardstick(ctx context.Context) (Image, error) {
	b := l.builder(l.out("bench"))
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return Image{}, fmt.Errorf("lab: %w", err)
	}
	program := filepath.Join(b.Out, "poweroff")
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./images/lab/cmd/poweroff")
	c.Dir, c.Env = l.Root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return Image{}, fmt.Errorf("lab: yardstick: %w: %s", err, out)
	}
	initrd, err := archive(program)
	if err != nil {
		return Image{}, fmt.Errorf("lab: yardstick: %w", err)
	}
	image, err := os.ReadFile(l.out(images.HostImage))
	if err != nil {
		return Image{}, fmt.Errorf("lab: yardstick: %w", err)
	}
	parts, err := uki.Split(image)
	if err != nil {
		return Image{}, fmt.Errorf("lab: yardstick: %w", err)
	}
	parts.Initrd = initrd
	keys, err := b.LoadKeys()
	if err != nil {
		return Image{}, err
	}
	if image, err = uki.Build(parts); err != nil {
		return Image{}, fmt.Errorf("lab: yardstick: %w", err)
	}
	if image, err = uki.Sign(image, keys.DB); err != nil {
		return Image{}, fmt.Errorf("lab: yardstick: %w", err)
	}
	if err := writeFile(filepath.Join(b.Out, images.HostImage), image, 0o644); err != nil {
		return Image{}, err
	}
	return l.disk(b, "yardstick")
}

// archive is an initramfs whose init is the program.
func archive(program string) ([]byte, error) {
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out)
	if err != nil {
		return nil, err
	}
	w := cpio.Newc.Writer(z)
	for _, r := range []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(data), 0o755),
	} {
		if err := w.WriteRecord(r); err != nil {
			return nil, err
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	return out.Bytes(), z.Close()
}

// timeYardstick returns the seconds from power-on to power-off.
func (l *Lab) timeYardstick(ctx context.Context, image Image) (float64, error) {
	if _, err := l.Up(ctx, Boot{Image: image, Stay: true, NoSite: true}); err != nil {
		return 0, err
	}
	s, err := l.load()
	if err != nil {
		return 0, err
	}
	p, err := l.find("qemu")
	if err == nil {
		late, cancel := context.WithTimeout(ctx, 5*time.Minute)
		defer cancel()
		err = p.wait(late)
	}
	if err != nil {
		return 0, fmt.Errorf("lab: yardstick: %w", err)
	}
	return time.Since(s.PowerOn).Seconds(), nil
}

// benchStreams measures in the laptop that is up.
func (l *Lab) benchStreams(ctx context.Context) (rates, ratios map[string]float64, err error) {
	inner, err := l.innerAddress(ctx)
	if err != nil {
		return nil, nil, err
	}
	sink, err := l.start(spec{name: "sink", namespace: "sekisho-lgwan", argv: []string{l.bin("lab"), "helper", "sink"}})
	if err != nil {
		return nil, nil, err
	}
	defer sink.stop(ctx, time.Second)
	for _, argv := range [][]string{
		{"labhook", "sink", strconv.Itoa(rawPort)},
		{"labhook", "sink", "-frames", strconv.Itoa(framePort)},
	} {
		if a, err := l.Call(ctx, hook.Request{Target: hook.Host, Argv: argv, Detach: true}); err != nil || a.Error != "" {
			return nil, nil, fmt.Errorf("lab: bench: %v %s", err, a.Error)
		}
	}
	count := strconv.Itoa(benchBytes)
	all, part := map[string][]float64{}, map[string][]float64{}
	for i := range benchStreams {
		round := map[string]float64{}
		for name, do := range map[string]struct {
			target hook.Target
			argv   []string
			end    []string // at the host domain, once more for each attempt
		}{
			streamRaw:    {hook.Work, []string{"labguest", "stream", "-vsock", strconv.Itoa(rawPort), count}, nil},
			streamLink:   {hook.Work, []string{"labguest", "stream", "-frames", "-vsock", strconv.Itoa(framePort), count}, nil},
			streamAlone:  {hook.Work, []string{"labguest", "stream", "-tcp", aloneAddress, count}, []string{"labhook", "link", inner, aloneAddress}},
			streamBoth:   {hook.Work, []string{"labguest", "stream", "-tcp", sinkAddress, count}, nil},
			streamTunnel: {hook.Host, []string{"labhook", "tunnel", inner, sinkAddress, count}, nil},
		} {
			if round[name], err = l.benchStream(ctx, do.target, do.argv, do.end); err != nil {
				return nil, nil, fmt.Errorf("lab: bench: %s: %w", name, err)
			}
		}
		for _, name := range streams {
			l.say("lab: round %d of %d: %-23s %7.0f Mbit/s", i+1, benchStreams, name, round[name])
			all[name] = append(all[name], round[name])
			part[name] = append(part[name], round[name]/round[streamRaw])
		}
	}
	rates, ratios = map[string]float64{}, map[string]float64{}
	for _, name := range streams {
		rates[name], ratios[name] = median(all[name]), median(part[name])
	}
	return rates, ratios, nil
}

// benchStream runs one stream. What it needs may not be there yet (a sink that
// is starting, a link that comes back after a tunnel's round): it tries again.
func (l *Lab) benchStream(ctx context.Context, target hook.Target, argv, end []string) (mbps float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	last := ""
	err = waitFor(ctx, "a stream", func() (bool, error) {
		if end != nil { // it ends after one stream; one that is still there keeps its place
			if a, err := l.Call(ctx, hook.Request{Target: hook.Host, Argv: end, Detach: true}); err != nil || a.Error != "" {
				return false, fmt.Errorf("%v %s", err, a.Error)
			}
		}
		a, err := l.Call(ctx, hook.Request{Target: target, Timeout: time.Minute, Argv: argv})
		if err != nil || a.Exit != 0 || a.Error != "" {
			last = fmt.Sprintf("%v %s %s", err, a.Error, a.Stderr)
			return false, nil
		}
		r, err := stream.ParseResult(a.Stdout)
		mbps = r.Mbps()
		return err == nil, err
	})
	if err != nil {
		return 0, fmt.Errorf("%w; last: %.400s", err, last)
	}
	return mbps, nil
}

// innerAddress is what the gateway gave to the laptop.
func (l *Lab) innerAddress(ctx context.Context) (string, error) {
	s, err := l.Daemon(ctx, "netd")
	if err != nil {
		return "", err
	}
	var n netd.Status
	if err := json.Unmarshal(s.Body, &n); err != nil {
		return "", fmt.Errorf("lab: netd: %w", err)
	}
	if n.Tunnel == nil {
		return "", fmt.Errorf("lab: netd is %s: no tunnel to measure", n.State)
	}
	return n.Tunnel.Inner.String(), nil
}

// ServeSink receives streams behind the tunnel until ctx ends.
func ServeSink(ctx context.Context, log io.Writer) error {
	listener, err := net.Listen("tcp4", sinkAddress)
	if err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	return stream.Serve(listener, false, func(r stream.Result, err error) {
		fmt.Fprintf(log, "%d bytes, %.0f Mbit/s, %v\n", r.Bytes, r.Mbps(), err)
	})
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// String is b as the tables of docs/performance.md.
func (b Bench) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "| stage | s since power-on (%s) |\n|---|---|\n", b.Accel)
	for _, name := range stageOrder {
		fmt.Fprintf(&s, "| %s | %.1f |\n", name, b.Stages[name])
	}
	fmt.Fprintf(&s, "| yardstick: same kernel, powers off at once | %.1f |\n| **page read / yardstick** | **%.2f** |\n\n", b.Baseline, b.BootRatio)
	fmt.Fprintf(&s, "| size | MiB |\n|---|---|\n| UKI | %.1f |\n| host domain's memory without the work domain | %.0f |\n\n", float64(b.UKI)/(1<<20), float64(b.HostMemory)/(1<<20))
	fmt.Fprintf(&s, "| stream | Mbit/s | ratio to raw vsock |\n|---|---|---|\n")
	for _, name := range streams {
		fmt.Fprintf(&s, "| %s | %.0f | %.2f |\n", name, b.Rates[name], b.Ratios[name])
	}
	return s.String()
}
