package path

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd/tunnel"
)

const (
	limit     = 4 * time.Second // of one question
	maxAnswer = 16 << 10        // bytes read of one
)

// Prober asks servers. Roots and Floor are needed.
type Prober struct {
	Agreement cryptrec.KeyAgreement // the least
	Roots     *x509.CertPool
	Floor     time.Time      // no chain is judged at an earlier moment
	Link      string         // the uplink
	Source    netip.Addr     // its IPv4 address
	Source6   netip.Addr     // its IPv6 address
	Proxy     netip.AddrPort // an HTTP proxy before the servers; zero is none
}

// Result is what came of one question.
type Result struct {
	Endpoint netip.AddrPort
	Answer   Answer
	What     string        // for people: who answered, or why nobody did
	Time     time.Time     // signed by the server; zero unless asked for and Ours
	Trip     time.Duration // of asking for it
}

// Ask asks e, at Address, who it is, and what time it is if clock.
func (p Prober) Ask(ctx context.Context, e attest.Endpoint, clock bool) Result {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r := Result{Endpoint: e.Address}
	raw, err := tunnel.DialTCP(ctx, tunnel.Path{Link: p.Link, Source: p.Source, Source6: p.Source6}, e.Address, p.Proxy)
	if err != nil {
		r.What = err.Error()
		return r
	}
	defer raw.Close()
	config := p.Agreement.Config()
	config.NextProtos = []string{"http/1.1"}
	config.ServerName = e.ServerName
	// The chain is judged below, at another time than the local clock's.
	config.InsecureSkipVerify = true
	var judged error
	config.VerifyConnection = func(s tls.ConnectionState) error {
		judged = verify(s.PeerCertificates, p.Roots, e.ServerName, p.Floor)
		return judged
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		r.Answer, r.What = whose(err, judged), err.Error()
		return r
	}
	if err := p.Agreement.Check(conn.ConnectionState()); err != nil {
		r.Answer, r.What = Foreign, err.Error()
		return r
	}
	r.Answer = Ours
	if clock {
		at, trip, err := date(ctx, conn, e.ServerName)
		if err == nil {
			err = within(conn.ConnectionState().PeerCertificates, at)
		}
		if err != nil {
			r.What = err.Error()
		} else {
			r.Time, r.Trip = at, trip
		}
	}
	return r
}

// whose tells from a failed handshake who was at the other end: a chain that
// is not ours, or something that is not TLS 1.3, is somebody else's.
func whose(err, judged error) Answer {
	var (
		lapsed x509.CertificateInvalidError
		record tls.RecordHeaderError
		alert  tls.AlertError
		remote *net.OpError
	)
	switch {
	case errors.As(judged, &lapsed) && lapsed.Reason == x509.Expired:
		return Silent // ours once: a matter for the organisation, not for a sign-in page
	case judged != nil, errors.As(err, &record), errors.As(err, &alert):
		return Foreign
	case errors.As(err, &remote) && remote.Op == "remote error": // an alert: something there speaks TLS, not as ours does
		return Foreign
	case errors.As(err, &remote), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return Silent
	}
	return Foreign // a handshake that went wrong otherwise: not a server of ours
}

// date asks for the time over an authenticated connection.
func date(ctx context.Context, conn *tls.Conn, host string) (time.Time, time.Duration, error) {
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	start := time.Now()
	if _, err := fmt.Fprintf(conn, "HEAD /v1/time HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host); err != nil {
		return time.Time{}, 0, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxAnswer)), &http.Request{Method: http.MethodHead})
	if err != nil {
		return time.Time{}, 0, err
	}
	resp.Body.Close()
	trip := time.Since(start)
	t, err := http.ParseTime(resp.Header.Get("Date"))
	return t, trip, err
}
