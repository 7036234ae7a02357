package fleet

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/eventlog"
)

// Of BenchmarkStorm: how many laptops come, and within which time.
const (
	stormLaptops = loadLaptops
	stormWithin  = 2 * time.Second
	stormOpen    = 1024 // connections at once on the laptops' side: files are few in one process
)

// BenchmarkStorm is 8:30 in the morning, pressed into a moment: all laptops
// come within two seconds, each with a TLS handshake of its own, all of them
// from one address, as behind a carrier's translator. They obey what the
// verifier tells them, with their tickets, until each is affirmed; any other
// answer than an affirmation or a time to come back ends the benchmark. They
// share the processors with the verifier. Waits are from the first try to the
// affirmation.
func BenchmarkStorm(b *testing.B) {
	const corpus = "../../../shared/corpus/attest/eventlog-with-pcrs/guard-win-supermicro-wbclquote"
	log, err := os.ReadFile(corpus + ".eventlog")
	if errors.Is(err, fs.ErrNotExist) {
		b.Skip("the corpus of event logs is not here")
	}
	if err != nil {
		b.Fatal(err)
	}
	sidecar, err := os.ReadFile(corpus + ".pcrs.json")
	if err != nil {
		b.Fatal(err)
	}
	values, err := eventlog.ParseValues(sidecar)
	if err != nil {
		b.Fatal(err)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(GCPercent)) // as the verifier does
	l := newLoad(b, log, values[eventlog.SHA256])
	for b.Loop() {
		l.storm(b)
	}
}

func (l *load) storm(b *testing.B) {
	var before, peak runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var asked, told atomic.Int64
	open := make(chan struct{}, stormOpen)
	took := make([]time.Duration, stormLaptops)
	cpu, begin := processorTime(), time.Now()
	var wg sync.WaitGroup
	for i, x := range l.laptops {
		wg.Go(func() {
			wait := time.NewTimer(stormWithin * time.Duration(i) / stormLaptops)
			defer wait.Stop()
			var first time.Time
			var ticket []byte
			for {
				<-wait.C
				if first.IsZero() {
					first = time.Now()
				}
				open <- struct{}{}
				asked.Add(1)
				later, err := l.once(b.Context(), x, ticket)
				<-open
				if err != nil {
					b.Error(err)
					return
				}
				if later == nil {
					took[i] = time.Since(first)
					return
				}
				told.Add(1)
				ticket = later.Ticket
				wait.Reset(time.Duration(later.RetryAfter) * time.Millisecond)
			}
		})
	}
	done := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() { // the most heap, of both sides together
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak.HeapInuse = max(peak.HeapInuse, m.HeapInuse)
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	})
	wg.Wait()
	elapsed := time.Since(begin)
	cpu = processorTime() - cpu
	close(done)
	watch.Wait()
	var after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&after)
	slices.Sort(took)
	b.ReportMetric(elapsed.Seconds(), "s-all-affirming")
	b.ReportMetric(float64(stormLaptops)/elapsed.Seconds(), "laptops/s")
	b.ReportMetric(took[stormLaptops/2].Seconds(), "s-p50")
	b.ReportMetric(took[stormLaptops*99/100].Seconds(), "s-p99")
	b.ReportMetric(float64(asked.Load())/stormLaptops, "questions-each")
	b.ReportMetric(float64(told.Load()), "told-to-wait")
	b.ReportMetric(float64(cpu.Microseconds())/1000/stormLaptops, "ms-cpu")
	b.ReportMetric(float64(before.HeapInuse)/(1<<20), "MiB-before")
	b.ReportMetric(float64(peak.HeapInuse)/(1<<20), "MiB-peak")
	b.ReportMetric(float64(after.HeapInuse)/(1<<20), "MiB-after")
	b.ReportMetric(0, "ns/op")
}

// stormTime bounds one visit of a laptop, as attestd's calls are; here the
// laptops share the processors with the verifier and each other.
const stormTime = 90 * time.Second

// once is one visit of a laptop: it is affirmed, or told when to come back.
func (l *load) once(ctx context.Context, x *simulated, ticket []byte) (*attest.Busy, error) {
	conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, 255, 1)}}).DialContext(ctx, "tcp", l.address)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(stormTime))
	t := tls.Client(conn, l.tls)
	c := &client{Conn: t, r: bufio.NewReader(t)}
	defer c.Close()
	question, err := json.Marshal(attest.ChallengeRequest{Device: x.id, Ticket: ticket})
	if err != nil {
		return nil, err
	}
	later, data, err := c.visit(httpRequest(attest.PathChallenge, "application/json", question))
	if later != nil || err != nil {
		return later, err
	}
	var challenge attest.Challenge
	if err := json.Unmarshal(data, &challenge); err != nil {
		return nil, err
	}
	evidence, err := x.answer(nil, challenge.Nonce, l.log[:len(l.log)-loadLaptops+x.padding])
	if err != nil {
		return nil, err
	}
	if later, data, err = c.visit(evidence); later != nil || err != nil {
		return later, err
	}
	var answer attest.AttestResponse
	if err := json.Unmarshal(data, &answer); err != nil {
		return nil, err
	}
	if answer.Result.Status != attest.StatusAffirming || len(answer.Chain) == 0 {
		return nil, fmt.Errorf("refused: %v %s", answer.Result.Reason, answer.Result.Detail)
	}
	return nil, nil
}

// visit sends a request; the answer is a time to come back, or a body.
func (c *client) visit(req []byte) (*attest.Busy, []byte, error) {
	if _, err := c.Write(req); err != nil {
		return nil, nil, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return nil, data, nil
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		var later attest.Busy
		if err := json.Unmarshal(data, &later); err != nil || later.RetryAfter <= 0 {
			return nil, nil, fmt.Errorf("%s: %s", resp.Status, data)
		}
		return &later, nil, nil
	}
	return nil, nil, fmt.Errorf("%s: %s", resp.Status, data)
}
