package attester

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/attest/proxy"
)

// callTime bounds one request to a verifier.
const callTime = 15 * time.Second

// maxAnswer bounds a verifier's answer in bytes: a result with all its
// findings and a chain.
const maxAnswer = 512 << 10

// unreachable is an error that says that no verifier answered, as opposed to
// one that answered with a refusal.
type unreachable struct {
	address string
	err     error
}

func (u *unreachable) Error() string { return fmt.Sprintf("verifier %s: %v", u.address, u.err) }
func (u *unreachable) Unwrap() error { return u.err }

// busy is an error that says that a verifier wants us to come back later.
type busy struct {
	address string
	detail  string
	wait    time.Duration
}

func (b *busy) Error() string {
	return fmt.Sprintf("verifier %s: %s; our turn is in %s", b.address, b.detail, b.wait.Round(time.Second))
}

// maxBusy is the longest that a verifier may send us away for.
const maxBusy = 15 * time.Minute

// busyOf reads the answer of a verifier that is busy, nil if it says nothing
// of when to come back.
func busyOf(address string, resp *http.Response, data []byte) (*busy, []byte) {
	if resp.StatusCode != http.StatusServiceUnavailable && resp.StatusCode != http.StatusTooManyRequests {
		return nil, nil
	}
	var b attest.Busy
	if json.Unmarshal(data, &b) != nil || len(b.Ticket) > maxTicket {
		b = attest.Busy{}
	}
	wait := time.Duration(min(b.RetryAfter, maxBusy.Milliseconds())) * time.Millisecond
	if wait <= 0 { // a proxy's, perhaps (RFC 9110, section 10.2.3)
		n, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 32)
		if err != nil || n == 0 {
			return nil, nil
		}
		wait = min(maxBusy, time.Duration(n)*time.Second)
	}
	return &busy{address, "it is busy", wait}, b.Ticket
}

// maxTicket bounds a ticket to come back with, in bytes.
const maxTicket = 256

// remote is one verifier.
type remote struct {
	endpoint attest.Endpoint
	http     *http.Client
	ticket   []byte // to come back with; of Run's goroutine alone
}

// newRemote returns a client of a verifier, by the HTTP proxy by if that is valid.
func newRemote(e attest.Endpoint, roots *x509.CertPool, agreement cryptrec.KeyAgreement, by netip.AddrPort) *remote {
	config := agreement.Config()
	config.RootCAs = roots
	config.ServerName = e.ServerName
	return &remote{endpoint: e, http: &http.Client{
		Timeout: callTime,
		Transport: &http.Transport{
			// The endpoint is an address; no name is ever asked for.
			DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				addresses := e.Addresses()
				if by.IsValid() { // its family is the path's
					addresses = []netip.AddrPort{e.Address}
				}
				c, err := attest.First(ctx, addresses, func(ctx context.Context, a netip.AddrPort) (*tls.Conn, error) {
					raw, err := proxy.Dial(ctx, &net.Dialer{}, a, by)
					if err != nil {
						return nil, err
					}
					c := tls.Client(raw, config)
					if err := c.HandshakeContext(ctx); err != nil {
						return nil, errors.Join(err, raw.Close())
					}
					return c, nil
				}, func(c *tls.Conn) { c.Close() })
				if err != nil {
					return nil, err
				}
				if err := agreement.Check(c.ConnectionState()); err != nil {
					return nil, errors.Join(err, c.Close())
				}
				return c, nil
			},
			MaxIdleConns:           1,
			IdleConnTimeout:        5 * time.Second,
			MaxResponseHeaderBytes: 16 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// call posts body and decodes the answer. A verifier's refusal comes back as
// *attest.Refusal, a time to come back as *busy, anything that is no proper
// answer as *unreachable.
func (r *remote) call(ctx context.Context, path, contentType string, body []byte, answer any) error {
	away := func(err error) error { return &unreachable{r.endpoint.Address.String(), err} }
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+r.endpoint.Address.String()+path, bytes.NewReader(body))
	if err != nil {
		return away(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := r.http.Do(req)
	if err != nil {
		return away(errors.Unwrap(err)) // *url.Error repeats the address
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return away(err)
	}
	if len(data) > maxAnswer {
		return away(fmt.Errorf("answer over %d bytes", maxAnswer))
	}
	if resp.StatusCode == http.StatusForbidden {
		var why attest.Refusal
		if err := json.Unmarshal(data, &why); err != nil || why.Reason == attest.ReasonNone {
			return away(errors.New("answer is no refusal of ours; is it the verifier?"))
		}
		return &why
	}
	if b, ticket := busyOf(r.endpoint.Address.String(), resp, data); b != nil {
		if path == attest.PathChallenge {
			r.ticket = ticket
		}
		return b
	}
	if resp.StatusCode != http.StatusOK {
		return away(fmt.Errorf("http status %d: %.200s", resp.StatusCode, bytes.TrimSpace(data)))
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return away(fmt.Errorf("answer: %w", err))
	}
	return nil
}

func (r *remote) callJSON(ctx context.Context, path string, question, answer any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	return r.call(ctx, path, "application/json", body, answer)
}
