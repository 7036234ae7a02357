package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"sekisho/attest"
	"sekisho/attest/approval"
)

// Further paths of the admin API.
const (
	AdminPermits  = "/admin/v1/permits"  // GET → []Permit; POST approval.Signed → Permit
	AdminFormer   = "/admin/v1/former"   // GET [?device=ID] → []Former, oldest first
	AdminPurchase = "/admin/v1/purchase" // GET → map of EK digest to Purchase; POST PurchaseRequest → PurchaseResponse
)

// maxPurchaseBody bounds a purchase list in bytes of JSON.
const maxPurchaseBody = 8 << 20

// PurchaseRequest puts endorsement keys on the purchase list.
type PurchaseRequest struct {
	Source string          `json:"source"`
	Keys   []attest.Digest `json:"keys"`
}

// PurchaseResponse says how many of them are new there.
type PurchaseResponse struct {
	Added int `json:"added"`
}

func (a *admin) identityRoutes() []route {
	return []route{
		{pattern: "GET " + AdminTickets, handler: a.tickets},
		{pattern: "DELETE " + AdminTickets, handler: a.revokeTicket},
		{pattern: "GET " + AdminPermits, handler: a.permits},
		{pattern: "POST " + AdminPermits, handler: a.addPermit},
		{pattern: "GET " + AdminFormer, handler: a.former},
		{pattern: "GET " + AdminPurchase, handler: a.purchase},
		{pattern: "POST " + AdminPurchase, handler: a.addPurchase},
	}
}

func (a *admin) tickets(w http.ResponseWriter, r *http.Request) {
	list, err := a.Tickets(r.Context())
	answer(a, w, list, err)
}

func (a *admin) revokeTicket(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	if err := a.RevokeTicket(r.Context(), id); err != nil {
		a.fail(w, http.StatusNotFound, err)
		return
	}
	a.log.Info("ticket revoked", "id", id)
	reply(w, http.StatusOK, struct{}{})
}

func (a *admin) permits(w http.ResponseWriter, r *http.Request) {
	list, err := a.Permits(r.Context())
	answer(a, w, list, err)
}

func (a *admin) addPermit(w http.ResponseWriter, r *http.Request) {
	signed, ok := a.approval(w, r)
	if !ok {
		return
	}
	p, err := a.AddPermit(r.Context(), signed)
	switch {
	case errors.Is(err, approval.ErrNotApproved):
		a.log.Warn("permit refused", "id", signed.ID(), "error", err)
		a.fail(w, http.StatusForbidden, err)
	case err != nil:
		a.fail(w, http.StatusBadRequest, err)
	default:
		a.log.Info("permit accepted", "id", p.ID, "device", p.Device, "signers", p.Signers, "reason", p.Reason)
		reply(w, http.StatusOK, p)
	}
}

// approval reads the approval in a request's body. Nothing in it counts yet.
func (a *admin) approval(w http.ResponseWriter, r *http.Request) (*approval.Signed, bool) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, attest.MaxMessage))
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return nil, false
	}
	signed, err := approval.Parse(data)
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return nil, false
	}
	return signed, true
}

func (a *admin) former(w http.ResponseWriter, r *http.Request) {
	var id attest.Digest
	if text := r.URL.Query().Get("device"); text != "" {
		var ok bool
		if id, ok = a.id(w, text); !ok {
			return
		}
	}
	list, err := a.Former(r.Context(), id)
	answer(a, w, list, err)
}

func (a *admin) purchase(w http.ResponseWriter, r *http.Request) {
	list, err := a.Purchase(r.Context())
	answer(a, w, list, err)
}

func (a *admin) addPurchase(w http.ResponseWriter, r *http.Request) {
	var req PurchaseRequest
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxPurchaseBody))
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	n, err := a.AddPurchase(r.Context(), req.Keys, req.Source)
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	a.log.Info("purchase list", "source", req.Source, "keys", len(req.Keys), "added", n)
	reply(w, http.StatusOK, PurchaseResponse{n})
}

// Tickets lists the tickets, without their texts.
func (a *Admin) Tickets(ctx context.Context) (list []Ticket, err error) {
	return list, a.do(ctx, http.MethodGet, AdminTickets, nil, &list)
}

// RevokeTicket makes a ticket worthless at once.
func (a *Admin) RevokeTicket(ctx context.Context, id string) error {
	var none struct{}
	return a.do(ctx, http.MethodDelete, AdminTickets+"?id="+url.QueryEscape(id), nil, &none)
}

// Permits lists the permits that were accepted, used ones too.
func (a *Admin) Permits(ctx context.Context) (list []Permit, err error) {
	return list, a.do(ctx, http.MethodGet, AdminPermits, nil, &list)
}

// AddPermit presents a signed permit, in JSON.
func (a *Admin) AddPermit(ctx context.Context, signed []byte) (p Permit, err error) {
	return p, a.do(ctx, http.MethodPost, AdminPermits, signed, &p)
}

// Former lists the records that permits have ended: those of device, before or
// after it, or all for "".
func (a *Admin) Former(ctx context.Context, device string) (list []Former, err error) {
	return list, a.do(ctx, http.MethodGet, AdminFormer+"?device="+url.QueryEscape(device), nil, &list)
}

// Purchase returns the purchase list.
func (a *Admin) Purchase(ctx context.Context) (list map[attest.Digest]Purchase, err error) {
	return list, a.do(ctx, http.MethodGet, AdminPurchase, nil, &list)
}

// AddPurchase puts endorsement keys on the purchase list.
func (a *Admin) AddPurchase(ctx context.Context, r PurchaseRequest) (n PurchaseResponse, err error) {
	body, err := json.Marshal(r)
	if err != nil {
		return n, err
	}
	return n, a.do(ctx, http.MethodPost, AdminPurchase, body, &n)
}

// ParsePurchase reads a purchase list: one digest in hexadecimal at the head
// of each line, whatever stands behind it; empty lines and lines that begin
// with # are skipped.
func ParsePurchase(data []byte) ([]attest.Digest, error) {
	if len(data) > maxPurchaseBody {
		return nil, fmt.Errorf("purchase list: %d bytes, at most %d: %w", len(data), maxPurchaseBody, attest.ErrTooLarge)
	}
	var keys []attest.Digest
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		fields := strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\r\n,;\ufeff", r) })
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		var d attest.Digest
		if err := d.UnmarshalText([]byte(strings.ToLower(fields[0]))); err != nil {
			return nil, fmt.Errorf("purchase list: line %d: %w", n, err)
		}
		if len(keys) == maxPurchase {
			return nil, fmt.Errorf("purchase list: over %d keys; split it", maxPurchase)
		}
		keys = append(keys, d)
	}
	return keys, nil
}
