package lab

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"sekisho/images/lab/capture"
)

// pageText is what the user in the work domain gets to read.
const pageText = `<!doctype html>
<html lang="ja"><meta charset="utf-8"><title>LGWAN ポータル</title>
<h1>関所を越えました</h1>
<p>このページは総合行政ネットワーク（LGWAN）の中にだけあります。</p>
<p>You have passed the Sekisho: this page exists only behind the tunnel.</p>
</html>
`

// maxTokens bounds the probes that are told apart.
const maxTokens = 1024

// ServePage serves the page and counts probe packets, until ctx ends. GET
// /probes answers with the count of packets per token.
func ServePage(ctx context.Context) error {
	var mu sync.Mutex
	counts := map[string]int{}
	probes, err := net.ListenPacket("udp4", probeAddress.String())
	if err != nil {
		return fmt.Errorf("page: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer context.AfterFunc(ctx, func() { probes.Close() })()
	defer probes.Close()
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, _, err := probes.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			token, _, ok := strings.Cut(string(buf[:n]), " ")
			mu.Lock()
			if _, known := counts[token]; err == nil && ok && (known || len(counts) < maxTokens) {
				counts[token]++
			}
			mu.Unlock()
		}
	})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		slog.Info("page read", "from", r.RemoteAddr)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(w, pageText)
	})
	mux.HandleFunc("GET /probes", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		json.NewEncoder(w).Encode(counts)
	})
	s := http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	ended := make(chan error, 2)
	var all sync.WaitGroup
	defer all.Wait()
	defer s.Close()
	for _, a := range []netip.AddrPort{pageAddress6, pageAddress} { // the last is waited for
		listener, err := net.Listen("tcp", a.String())
		if err != nil {
			return fmt.Errorf("page: %w", err)
		}
		all.Go(func() { ended <- s.Serve(listener) })
	}
	if err := <-ended; ctx.Err() == nil {
		return fmt.Errorf("page: %w", err)
	}
	return nil
}

// Probes prints what ServePage has counted, as JSON.
func Probes(ctx context.Context, out io.Writer) error {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, PageURL+"probes", nil)
	if err != nil {
		return err
	}
	p, err := http.DefaultClient.Do(q)
	if err != nil {
		return err
	}
	defer p.Body.Close()
	_, err = io.Copy(out, io.LimitReader(p.Body, 1<<20))
	return err
}

// stampLayout begins each line of out/run/console.log, in UTC.
const stampLayout = "2006-01-02T15:04:05.000000Z"

// maxConsoleLine bounds one line of the serial console in bytes; a longer one
// is written in parts.
const maxConsoleLine = 4 << 10

// StampConsole copies the lines of a serial console, each with the time at
// which its first byte came.
func StampConsole(in io.Reader, out io.Writer, now func() time.Time) error {
	r := bufio.NewReader(in)
	var line []byte
	var at time.Time
	flush := func() error {
		text := strings.Map(func(c rune) rune {
			if c < ' ' && c != '\t' || c == 0x7f {
				return -1 // cursor movements and the like
			}
			return c
		}, strings.ToValidUTF8(string(line), "?"))
		line = line[:0]
		_, err := fmt.Fprintf(out, "%s %s\n", at.UTC().Format(stampLayout), text)
		return err
	}
	for {
		b, err := r.ReadByte()
		switch {
		case errors.Is(err, io.EOF) && len(line) > 0:
			return flush()
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("console: %w", err)
		}
		if len(line) == 0 {
			at = now()
		}
		if b != '\n' {
			line = append(line, b)
		}
		if b == '\n' || len(line) >= maxConsoleLine {
			if err := flush(); err != nil {
				return fmt.Errorf("console: %w", err)
			}
		}
	}
}

// RecordUplink writes the frames of an interface to a file until ctx ends, and
// then what it knows of the recording to out.
func RecordUplink(ctx context.Context, name, file string, out io.Writer) error {
	r, err := capture.Open(name)
	if err != nil {
		return err
	}
	defer r.Close()
	f, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	defer f.Close()
	stats, err := r.Record(ctx, f)
	return errors.Join(err, json.NewEncoder(out).Encode(stats), f.Close())
}

// assetsText is what the office's server says to whoever calls.
const assetsText = "asset management, called by "

// ServeAssets says who called, on an address in the office's LAN, until ctx ends.
func ServeAssets(ctx context.Context, address string) error {
	s := http.Server{Addr: address, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, assetsText+r.RemoteAddr+"\n") })}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.ListenAndServe(); ctx.Err() == nil {
		return fmt.Errorf("assets: %w", err)
	}
	return nil
}

// ServePortal answers every connection as a hotel's sign-in page does that
// wants to look like the Internet: TLS 1.3 with a certificate of its own, and
// HTTP status 204 whatever was asked.
func ServePortal(ctx context.Context, address string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("portal: %w", err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "hotel"}, NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("portal: %w", err)
	}
	s := http.Server{Addr: address, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 8 << 10,
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		ErrorLog:  log.New(io.Discard, "", 0),
		Handler:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.ListenAndServeTLS("", ""); ctx.Err() == nil {
		return fmt.Errorf("portal: %w", err)
	}
	return nil
}
