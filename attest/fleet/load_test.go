package fleet

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/attest/archive"
	"sekisho/attest/cryptrec"
	"sekisho/attest/eventlog"
	"sekisho/attest/store"
	"sekisho/attest/tpm/faketpm"
	"sekisho/attest/verifier"
)

// Of BenchmarkLoad: laptops, each of which may attest 16 times within 120 s,
// and how many of them attest at the same time.
const (
	loadLaptops = 4000
	loadTime    = 10 * time.Second
	loadAtOnce  = 48
	loadConns   = 8 // connections of each of them, from as many addresses
)

// simulated is one laptop with keys in software. Its evidence is encoded once;
// what changes with the nonce, the signed statements first, is put into its
// places, and the log stands between before and after: processors and memory
// are the server's too.
type simulated struct {
	*faketpm.TPM
	id, key  attest.Digest // key: SHA-256 of the SubjectPublicKeyInfo of its credential key
	log      attest.Digest // SHA-256 of its event log
	question []byte        // the request of a challenge
	padding  int           // of the event log, in bytes
	before   []byte        // the request with evidence, up to the log
	after    []byte        // and behind the log
	from     net.TCPAddr   // limits are by address, so each has its own

	nonce, quote, quoteSig, certify, certifySig []byte // places in before and after
}

// BenchmarkLoad has simulated laptops speak the real protocol over real TLS
// with the real server on loopback: challenge, evidence with a 43 KB Windows
// event log (each laptop its own), appraisal in full, signed result,
// certificate, record in etcd and report in the archive, both synced to disk.
// Clients and server share the processors. first-boot is each laptop once, with
// logs that the verifier has never seen, which a second reader reads and the
// archive stores; in the others all laptops have been here before, as a laptop
// shows the same log until its next update. Rates are printed beside the raw
// P-256 verification rate of the same run, on all processors. On a machine that
// is busy with other things, only the processor times count: ms-cpu is that of
// one verification, client and server and etcd together, µs-cpu-raw that of one
// raw verification, and by-cpu/s what two processors of our own would carry.
func BenchmarkLoad(b *testing.B) {
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
	for _, mode := range []struct {
		name        string
		first, keep bool
	}{{"first-boot", true, true}, {"kept-connections", false, true}, {"handshake-each", false, false}} {
		b.Run(mode.name, func(b *testing.B) {
			l := newLoad(b, log, values[eventlog.SHA256])
			for b.Loop() {
				if mode.first {
					l.run(b, true, loadLaptops, time.Hour)
					continue
				}
				l.drive(b, true, loadLaptops, time.Hour)
				l.run(b, mode.keep, math.MaxInt64, loadTime)
			}
		})
	}
}

type load struct {
	address string
	tls     *tls.Config
	log     []byte // with the most padding
	laptops []*simulated
	next    atomic.Int64
	conns   [loadAtOnce][loadConns]*client // the laptops' connections, taken in turn
}

func newLoad(b *testing.B, log []byte, pcrs map[int][]byte) *load {
	dir := b.TempDir()
	st, err := store.Open(b.Context(), store.Config{Dir: filepath.Join(dir, storeDir)})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { st.Close() })
	key, err := loadReportKey(filepath.Join(dir, "report.key"))
	if err != nil {
		b.Fatal(err)
	}
	a, err := archive.Open(filepath.Join(dir, "archive"), archive.Retention{Bytes: 8 << 30}, time.Now, func() error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { a.Close() })
	config := Config{Verifier: name, Organization: org, Reports: &Reports{a, key}, Log: slog.New(slog.DiscardHandler)}
	if config.Audit, err = openAudit(b.Context(), filepath.Join(dir, "log.key"), filepath.Join(dir, "log"), &config); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { config.Audit.Close() })
	ref := attest.ReferenceValues{Image: "windows", Version: "1", PCRs: make(map[int]attest.Digest)}
	boot := make(map[int]attest.Digest)
	for _, i := range attest.QuotedPCRs {
		boot[i] = attest.Digest(pcrs[i])
		if i == 4 || i == 11 {
			ref.PCRs[i] = boot[i]
		}
	}
	ca, caKey := authority(b, "devices")
	issuer, err := verifier.NewIssuer(ca, caKey, org, 10*time.Minute)
	if err != nil {
		b.Fatal(err)
	}
	s, err := NewService(b.Context(), Config{
		Verifier: name, Organization: org, Lifetime: 10 * time.Minute, Store: st, Issuer: issuer, References: []attest.ReferenceValues{ref},
		Now: time.Now, Reports: &Reports{a, key}, Brake: NewBrake(5),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.Close)
	l := &load{log: append(slices.Clone(log), make([]byte, loadLaptops)...)}
	l.enrol(b, s, len(log), boot)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	l.address = listener.Addr().String()
	server, roots := testServer(b, ca)
	l.tls = cryptrec.Config()
	l.tls.RootCAs, l.tls.ServerName = roots, name
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, listener, server, s, slog.New(slog.NewTextHandler(io.Discard, nil)))
	}()
	b.Cleanup(func() {
		for i := range l.conns {
			for _, c := range l.conns[i] {
				if c != nil {
					c.Close()
				}
			}
		}
		stop()
		<-served
	})
	return l
}

// enrol puts the laptops into the registry: enrolment itself is not measured.
func (l *load) enrol(b *testing.B, s *Service, logSize int, pcrs map[int]attest.Digest) {
	var ops []clientv3.Op
	put := func(last bool) {
		if len(ops) >= 100 || last {
			if _, err := s.Store.Client().Txn(b.Context()).Then(ops...).Commit(); err != nil {
				b.Fatal(err)
			}
			ops = nil
		}
	}
	for i := range loadLaptops {
		x := &simulated{TPM: faketpm.New()}
		x.PCRs = pcrs
		x.from.IP = net.IPv4(127, 1, byte(i>>8), byte(i))
		id := x.Identity()
		x.id, x.key = identify(b, x.TPM)
		x.padding = i // it makes a log another one
		x.prepare(b, l.log[:logSize+i])
		data, err := json.Marshal(Device{ID: x.id, EK: id.EK, EKCertificate: make([]byte, 1000), AK: id.AK, TicketID: "load", Enrolled: time.Now()})
		if err != nil {
			b.Fatal(err)
		}
		ops = append(ops, clientv3.OpPut(s.keys.device(x.id), string(data)))
		put(i == loadLaptops-1)
		l.laptops = append(l.laptops, x)
	}
}

// prepare encodes the evidence and the request for a nonce.
func (x *simulated) prepare(b *testing.B, log []byte) {
	question, err := json.Marshal(attest.ChallengeRequest{Device: x.id})
	if err != nil {
		b.Fatal(err)
	}
	x.question = httpRequest(attest.PathChallenge, "application/json", question)
	x.log = sha256.Sum256(log)
	e, err := evidenceFor(x.TPM, x.id, x.key, make([]byte, 64), log) // the size of a nonce
	if err != nil {
		b.Fatal(err)
	}
	data, err := e.Encode()
	if err != nil {
		b.Fatal(err)
	}
	before, after, _ := bytes.Cut(httpRequest(attest.PathAttest, attest.ContentType, data), log)
	x.before, x.after = bytes.Clone(before), bytes.Clone(after)
	place := func(in, field []byte) []byte {
		_, from, _ := bytes.Cut(in, append([]byte{0x58, byte(len(field))}, field...)) // a byte string of under 256 bytes
		return in[len(in)-len(from)-len(field):][:len(field)]
	}
	x.nonce, x.quote, x.quoteSig = place(x.before, e.Nonce), place(x.before, e.Quote), place(x.before, e.QuoteSig)
	x.certify, x.certifySig = place(x.after, e.Certify), place(x.after, e.CertifySig)
}

// answer signs for a nonce and appends the request with evidence to buf.
func (x *simulated) answer(buf, nonce, log []byte) ([]byte, error) {
	extra, err := attest.Binding{
		Nonce: nonce, Device: x.id, Verifier: name, Purpose: attest.PurposeNetwork, Key: x.key, EventLog: x.log,
	}.Digest()
	if err != nil {
		return nil, err
	}
	p, err := x.Attest(extra)
	if err != nil {
		return nil, err
	}
	copy(x.nonce, nonce)
	copy(x.quote, p.Quote)
	copy(x.quoteSig, p.QuoteSig)
	copy(x.certify, p.Certify)
	copy(x.certifySig, p.CertifySig)
	return append(append(append(buf, x.before...), log...), x.after...), nil
}

// drive has laptops attest, the next one each time, until there were that many
// or the time is over. It returns how long each took, in order of length.
func (l *load) drive(b *testing.B, keep bool, count int64, limit time.Duration) []time.Duration {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var took []time.Duration
	begin, first := time.Now(), l.next.Load()
	for i := range l.conns {
		wg.Go(func() {
			var mine []time.Duration
			conns := &l.conns[i]
			for n := 0; time.Since(begin) < limit; n++ {
				i := l.next.Add(1)
				if i-first > count {
					break
				}
				start := time.Now()
				if err := l.attest(b.Context(), &conns[n%loadConns], l.laptops[int(i)%len(l.laptops)], keep); err != nil {
					b.Error(err)
					break
				}
				mine = append(mine, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took
}

// run drives the laptops and reports what it saw. Growth of the heap is that
// over the run, of what is left after a collection.
func (l *load) run(b *testing.B, keep bool, count int64, limit time.Duration) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	raw, rawTime := rawVerifications(time.Second / 2)
	cpu, begin := processorTime(), time.Now()
	took := l.drive(b, keep, count, limit)
	elapsed := time.Since(begin)
	cpu = processorTime() - cpu
	runtime.GC()
	runtime.ReadMemStats(&after)
	rawAgain, rawTimeAgain := rawVerifications(time.Second / 2)
	raw, rawTime = (raw+rawAgain)/2, (rawTime+rawTimeAgain)/2
	if len(took) == 0 {
		b.Fatal("nothing was verified")
	}
	rate := float64(len(took)) / elapsed.Seconds()
	b.ReportMetric(rate, "verifications/s")
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-p50")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "ms-p99")
	b.ReportMetric(raw, "raw-P256/s")
	b.ReportMetric(rate/raw, "ratio")
	each := cpu / time.Duration(len(took))
	b.ReportMetric(float64(each.Microseconds())/1000, "ms-cpu")
	b.ReportMetric(float64(rawTime.Nanoseconds())/1000, "µs-cpu-raw")
	b.ReportMetric(2/each.Seconds(), "by-cpu/s")
	b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/(1<<20), "MiB-growth")
	b.ReportMetric(float64(after.HeapAlloc)/(1<<20), "MiB-heap")
	b.ReportMetric(0, "ns/op")
}

// rawVerifications is how many P-256 signatures all processors verify within a
// second, and how much processor time each takes.
func rawVerifications(d time.Duration) (float64, time.Duration) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	digest := sha256.Sum256(nil)
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		panic(err)
	}
	var n atomic.Int64
	var wg sync.WaitGroup
	begin, cpu := time.Now(), processorTime()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for time.Since(begin) < d {
				if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
					panic("signature")
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(n.Load()) / time.Since(begin).Seconds(), (processorTime() - cpu) / time.Duration(n.Load())
}

// processorTime is what this process has used so far.
func processorTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err) // it does not fail for ourselves
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// client is a laptop's connection: HTTP/1.1 by hand, for the processors are
// the server's too.
type client struct {
	*tls.Conn
	r   *bufio.Reader
	buf []byte // of requests
}

// httpRequest is a whole HTTP request.
func httpRequest(path, kind string, body []byte) []byte {
	return append(fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", path, name, kind, len(body)), body...)
}

// post sends a request and returns the body of the answer.
func (c *client) post(req []byte) ([]byte, error) {
	if _, err := c.Write(req); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", resp.Status, data)
	}
	return data, nil
}

// attest is one whole verification of a laptop.
func (l *load) attest(ctx context.Context, c **client, x *simulated, keep bool) error {
	if *c == nil {
		d := net.Dialer{LocalAddr: &x.from}
		conn, err := d.DialContext(ctx, "tcp", l.address)
		if err != nil {
			return err
		}
		t := tls.Client(conn, l.tls)
		*c = &client{Conn: t, r: bufio.NewReaderSize(t, 16<<10)}
		if err := t.HandshakeContext(ctx); err != nil {
			return err
		}
		if err := cryptrec.Check(t.ConnectionState()); err != nil {
			return err
		}
	}
	data, err := (*c).post(x.question)
	if err != nil {
		return err
	}
	var challenge attest.Challenge
	if err := json.Unmarshal(data, &challenge); err != nil {
		return err
	}
	if (*c).buf, err = x.answer((*c).buf[:0], challenge.Nonce, l.log[:len(l.log)-loadLaptops+x.padding]); err != nil {
		return err
	}
	if data, err = (*c).post((*c).buf); err != nil {
		return err
	}
	// To decode it would be the laptop's work, not the verifier's.
	if !bytes.HasPrefix(data, []byte(`{"result":{`)) || !bytes.Contains(data, []byte(`"ear.status":"affirming"`)) ||
		!bytes.Contains(data, []byte(`"chain":["MII`)) || !bytes.Contains(data, []byte(`"token":"0oR`)) {
		return fmt.Errorf("answer: %.300s", data)
	}
	if !keep {
		err = (*c).Close()
		*c = nil
	}
	return err
}

// testServer makes a server certificate, and the pool that trusts it.
func testServer(b testing.TB, ca *x509.Certificate) (tls.Certificate, *x509.CertPool) {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		b.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		b.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}
