package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/attest/store"
)

// maxAdminAnswer bounds an answer of the admin API in bytes.
const maxAdminAnswer = 256 << 20

// Admin is a client of the admin API.
type Admin struct {
	http *http.Client
}

// NewAdmin returns a client of the verifier whose admin socket is at path.
func NewAdmin(path string) *Admin {
	var d net.Dialer
	return &Admin{&http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) },
	}}}
}

// CreateTicket makes an enrolment ticket.
func (a *Admin) CreateTicket(ctx context.Context, uses int, life time.Duration) (t TicketResponse, err error) {
	body, err := json.Marshal(TicketRequest{uses, int64(life / time.Second)})
	if err != nil {
		return t, err
	}
	return t, a.do(ctx, http.MethodPost, AdminTickets, body, &t)
}

// Devices lists the enrolled devices.
func (a *Admin) Devices(ctx context.Context) (list []Device, err error) {
	return list, a.do(ctx, http.MethodGet, AdminDevices, nil, &list)
}

// Device shows one device.
func (a *Admin) Device(ctx context.Context, id string) (d Device, err error) {
	return d, a.do(ctx, http.MethodGet, AdminDevices+"/"+url.PathEscape(id), nil, &d)
}

// Retire ends a device.
func (a *Admin) Retire(ctx context.Context, id, reason string) (f Former, err error) {
	return f, a.do(ctx, http.MethodDelete, AdminDevices+"/"+url.PathEscape(id)+"?reason="+url.QueryEscape(reason), nil, &f)
}

// Escrows lists the escrowed recovery keys of a device, oldest first.
func (a *Admin) Escrows(ctx context.Context, id string) (list []seal.Escrow, err error) {
	return list, a.do(ctx, http.MethodGet, AdminEscrows+"/"+url.PathEscape(id), nil, &list)
}

// Results lists the last results, oldest first.
func (a *Admin) Results(ctx context.Context) (list []attest.Result, err error) {
	return list, a.do(ctx, http.MethodGet, AdminResults, nil, &list)
}

// References lists the images that are accepted.
func (a *Admin) References(ctx context.Context) (list []Reference, err error) {
	return list, a.do(ctx, http.MethodGet, AdminReferences, nil, &list)
}

// AddReference adds the reference values of one image, in JSON.
func (a *Admin) AddReference(ctx context.Context, values []byte) (r Reference, err error) {
	return r, a.do(ctx, http.MethodPost, AdminReferences, values, &r)
}

// RemoveReference removes reference values that AddReference added.
func (a *Admin) RemoveReference(ctx context.Context, id string) error {
	var none struct{}
	return a.do(ctx, http.MethodDelete, AdminReferences+"?id="+url.QueryEscape(id), nil, &none)
}

// ErrRefused is returned for what the verifier understood and will not do:
// signatures are missing, or the time is not right.
var ErrRefused = errors.New("refused")

// notFound is what the verifier says of what is not there; it is
// os.ErrNotExist.
type notFound struct{ why string }

func (e *notFound) Error() string { return e.why }

func (e *notFound) Is(target error) bool { return target == os.ErrNotExist }

// Backup writes all records of the verifier's store, once it has seen that the
// backup is whole.
func (a *Admin) Backup(ctx context.Context, to io.ReadWriteSeeker) (b store.Backup, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://verifier"+AdminBackup, nil)
	if err != nil {
		return b, err
	}
	patient := *a.http
	patient.Timeout = backupTime
	resp, err := patient.Do(req)
	if err != nil {
		return b, fmt.Errorf("verifier's admin socket: %w", errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return b, fmt.Errorf("verifier's admin socket: http status %d", resp.StatusCode)
	}
	if _, err := io.Copy(to, resp.Body); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	if _, err := to.Seek(0, io.SeekStart); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	return store.ReadBackup(to, func(string, []byte) error { return nil })
}

func (a *Admin) do(ctx context.Context, method, path string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://verifier"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	return adminAnswer(a.http, req, answer)
}

func adminAnswer(c *http.Client, req *http.Request, answer any) error {
	resp, err := c.Do(req)
	if err != nil {
		return fmt.Errorf("verifier's admin socket: %w", errors.Unwrap(err))
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAdminAnswer))
	if err != nil {
		return fmt.Errorf("verifier's admin socket: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var e adminError
		if json.Unmarshal(data, &e) != nil || e.Error == "" {
			e.Error = fmt.Sprintf("http status %d", resp.StatusCode)
		}
		if resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusConflict {
			return fmt.Errorf("%w: %s", ErrRefused, e.Error)
		}
		if resp.StatusCode == http.StatusNotFound {
			return &notFound{e.Error}
		}
		return errors.New(e.Error)
	}
	return json.Unmarshal(data, answer)
}
